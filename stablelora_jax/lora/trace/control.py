"""Operations that hold a computation of their own: the interpreter goes in, with the weights that they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.trace.context import Context, Equation, Use, axes_of, refuse, refused
from stablelora_jax.lora.trace.weight import Weight, dense

Evaluate = Callable[[Context, Any, Sequence[Any], Sequence[Any]], list[Any]]  # (context, jaxpr, consts, values)


def nested(evaluate: Evaluate, context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """``jit`` and other calls: written out."""
    closed = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    return evaluate(context, closed.jaxpr, closed.consts, values)


def checkpoint(evaluate: Evaluate, context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """``jax.checkpoint`` with the same policy."""
    prevent_cse = eqn.params["prevent_cse"]
    wrap = partial(
        jax.checkpoint,
        prevent_cse=prevent_cse if isinstance(prevent_cse, bool) else any(prevent_cse),
        policy=eqn.params["policy"],
    )
    found = wrap(lambda *given: _arrays(evaluate(context, eqn.params["jaxpr"], (), given)))(*values)
    return list(found)


def scan(evaluate: Evaluate, context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """``jax.lax.scan``: weights among the scanned arrays are sliced with their adapters."""
    params = eqn.params
    consts = values[: params["num_consts"]]
    carry = values[params["num_consts"] : params["num_consts"] + params["num_carry"]]
    if any(isinstance(x, Weight) for x in carry):
        return refuse(context, eqn, values, "is carried from step to step of a scan")
    xs = [_scanned(context, x) for x in values[params["num_consts"] + params["num_carry"] :]]
    closed = params["jaxpr"]

    def body(carry: Any, sliced: Any) -> Any:
        given = [*consts, *carry, *map(_one, sliced)]
        found = _arrays(evaluate(context, closed.jaxpr, closed.consts, given))
        return found[: params["num_carry"]], found[params["num_carry"] :]

    length, reverse, unroll = params["length"], params["reverse"], params["unroll"]
    carry, ys = jax.lax.scan(body, carry, xs, length=length, reverse=reverse, unroll=unroll)
    return [*carry, *ys]


def _scanned(context: Context, x: Any) -> Any:
    """A weight whose adapter has the scanned axis first, as the array has it."""
    if not isinstance(x, Weight):
        return x
    atoms = x.leaf.axes[0]
    if context.record is not None:
        context.record(x.leaf, Use("scan", stack=axes_of(atoms)))
    if not x.adapter:
        return x
    if len(atoms) != 1 or atoms[0] not in x.leaf.stack:
        refused(x.leaf, "is scanned along an axis that its adapters do not have as a stack")
    axis = x.leaf.stack.index(atoms[0])
    moved = {name: jnp.moveaxis(array, axis, 0) for name, array in x.adapter.items()}
    stack = (atoms[0], *(atom for atom in x.leaf.stack if atom != atoms[0]))
    return replace(x, adapter=moved, leaf=x.leaf._replace(stack=stack))


def _one(x: Any) -> Any:
    """A weight as the body of a scan sees it; its arrays are sliced already."""
    if not isinstance(x, Weight):
        return x
    leaf = x.leaf
    gone = leaf.axes[0]
    stack = tuple(atom for atom in leaf.stack if atom not in gone)
    columns = tuple(atom for atom in leaf.columns if atom not in gone)
    return replace(x, leaf=leaf._replace(axes=leaf.axes[1:], stack=stack, columns=columns))


def cond(evaluate: Evaluate, context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """``jax.lax.cond`` and ``switch``."""

    def branch(closed: Any, *given: Any) -> list[Any]:
        return _arrays(evaluate(context, closed.jaxpr, closed.consts, given))

    branches = [partial(branch, closed) for closed in eqn.params["branches"]]
    return list(jax.lax.switch(values[0], branches, *values[1:]))


def while_loop(evaluate: Evaluate, context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """``jax.lax.while_loop`` and ``fori_loop``: weights may be constants of the loop."""
    params = eqn.params
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = values[:of_cond], values[of_cond : of_cond + of_body], values[of_cond + of_body :]
    if any(isinstance(x, Weight) for x in carry):
        return refuse(context, eqn, values, "is carried from step to step of a loop")

    def again(carry: Any) -> Any:
        closed = params["cond_jaxpr"]
        return _arrays(evaluate(context, closed.jaxpr, closed.consts, [*cond_consts, *carry]))[0]

    def body(carry: Any) -> Any:
        closed = params["body_jaxpr"]
        return _arrays(evaluate(context, closed.jaxpr, closed.consts, [*body_consts, *carry]))

    return list(jax.lax.while_loop(again, body, list(carry)))


def custom(evaluate: Evaluate, context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """A function with derivatives of its own, which would be lost: refused."""
    del evaluate
    return refuse(context, eqn, values, "is read by a function with derivatives of its own (custom_jvp or custom_vjp)")


def _arrays(values: Sequence[Any]) -> list[Any]:
    """What a computation gives back: arrays, not weights."""
    return [returned(value) for value in values]


def returned(value: Any) -> Any:
    """An array that leaves the computation.

    Raises:
      InputError: it is a weight with an adapter.
    """
    if isinstance(value, Weight) and value.adapter:
        refused(value.leaf, "is itself an output of the model or of a part of it")
    return dense(value)


RULES: dict[str, Any] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "custom_lin"), nested),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), checkpoint),
    "scan": scan,
    "cond": cond,
    "while": while_loop,
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), custom),
}
