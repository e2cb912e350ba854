"""The interpreter: a jaxpr evaluated with weights among its inputs. Only equations that read a weight are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend import core

from stablelora_jax.lora.trace import control, products, structure
from stablelora_jax.lora.trace.context import Context, Equation, evaluated, refuse
from stablelora_jax.lora.trace.weight import Weight
from stablelora_jax.quantization import is_quantized

PLAIN = structure.RULES | products.RULES


class Traced(NamedTuple):
    """A function of parameters and arguments as its jaxpr."""

    closed: Any  # jax.extend.core.ClosedJaxpr: (parameters, arrays) -> outputs
    out: Any  # the structure of its output
    fixed: dict[int, Any]  # leaves of the output that are no arrays, by their numbers

    def run(self, context: Context, params: Sequence[Any], arrays: Sequence[Any]) -> Any:
        """Evaluate it; ``params`` may be weights."""
        found = iter(self.outputs(context, params, arrays))
        whole = [self.fixed[at] if at in self.fixed else next(found) for at in range(self.out.num_leaves)]
        return jax.tree.unflatten(self.out, whole)

    def outputs(self, context: Context, params: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
        """The arrays among the leaves of its output."""
        found = evaluate(context, self.closed.jaxpr, self.closed.consts, [*params, *arrays])
        return [control.returned(value) for value in found]


def trace(function: Callable[..., Any], params: Any, args: Any) -> tuple[Traced, list[Any]]:
    """``function(params, *args, **kwargs)`` traced, and the arrays among ``args``, a tuple ``(args, kwargs)``.

    Everything in ``args`` that has a shape and a dtype is an input of the jaxpr; the rest (flags, strings, numbers) is
    fixed, as it would be under ``jax.jit`` with static arguments. A quantised leaf is traced as its dense kernel.
    """
    leaves, structure_of = jax.tree.flatten(args)
    traced = [is_array(leaf) for leaf in leaves]

    def flat(params: Any, arrays: Any) -> Any:
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            structure_of, [next(given) if is_input else leaf for leaf, is_input in zip(leaves, traced, strict=True)]
        )
        found, out = jax.tree.flatten(function(params, *args, **kwargs))
        outs.append(out)
        fixed.update({at: leaf for at, leaf in enumerate(found) if not is_array(leaf)})
        return [leaf for leaf in found if is_array(leaf)]

    outs: list[Any] = []
    fixed: dict[int, Any] = {}
    arrays = [leaf for leaf, is_input in zip(leaves, traced, strict=True) if is_input]
    whole = jax.tree.map(_as_dense, params, is_leaf=is_quantized)
    closed = jax.make_jaxpr(flat)(whole, arrays)
    return Traced(closed, outs[-1], fixed), arrays


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an input or an output of a jaxpr, and not fixed."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _as_dense(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_quantized(leaf) else leaf


def evaluate(context: Context, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The outputs of an open jaxpr; they may be weights."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else env[variable]

    for eqn in jaxpr.eqns:
        found = _outputs(context, eqn, [read(variable) for variable in eqn.invars])
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _outputs(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    if not any(isinstance(value, Weight) for value in values):
        return evaluated(eqn, values)
    name = eqn.primitive.name
    rule: Any = PLAIN.get(name)
    if rule is None and name in control.RULES:
        rule = partial(control.RULES[name], evaluate)
    if rule is None or (name in structure.ALONE and not _first_alone(values)):
        rule = partial(refuse, why=f"is read by {name}")
    stack = str(eqn.source_info.name_stack)
    if not stack or name in control.RULES:
        return list(rule(context, eqn, values))
    with jax.named_scope(stack):
        return list(rule(context, eqn, values))


def _first_alone(values: Sequence[Any]) -> bool:
    """Whether the first value is a weight and no other is."""
    return isinstance(values[0], Weight) and not any(isinstance(value, Weight) for value in values[1:])
