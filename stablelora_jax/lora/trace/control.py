"""Operations that hold a computation of their own: the interpreter goes in, with the weights that they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from stablelora_jax.lora.trace.context import Context, Equation, Use, axes_of, refuse, refused
from stablelora_jax.lora.trace.weight import Weight, dense

Evaluate = Callable[[Context, Any, Sequence[Any], Sequence[Any]], list[Any]]  # (context, jaxpr, consts, values)

NESTED = ("jit", "pjit", "closed_call", "core_call")
CHECKPOINT = ("checkpoint", "remat", "remat2")


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
    return list(wrap(lambda *given: evaluate(context, eqn.params["jaxpr"], (), given))(*values))


def scan(evaluate: Evaluate, context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """``jax.lax.scan``: weights among the scanned arrays are sliced with their adapters."""
    params, closed = eqn.params, eqn.params["jaxpr"]
    of_consts, of_carry = _counts(params)
    kept = _unchanged(closed.jaxpr, values, {at: of_consts + at for at in range(of_carry)})
    moving = [at for at in range(of_carry) if at not in kept]
    if any(isinstance(values[of_consts + at], Weight) for at in moving):
        return refuse(context, eqn, values, "is carried from step to step of a scan and changed")
    handed = _unchanged(closed.jaxpr, values, range(of_carry, len(closed.jaxpr.outvars)), of_consts + of_carry)
    unread = {at for at, out in enumerate(eqn.outvars) if isinstance(out, core.DropVar)} | set(handed)
    xs = [_scanned(context, x) for x in values[of_consts + of_carry :]]

    def body(carry: Any, sliced: Any) -> Any:
        whole = list(values[: of_consts + of_carry])
        for at, value in zip(moving, carry, strict=True):
            whole[of_consts + at] = value
        found = evaluate(context, closed.jaxpr, closed.consts, [*whole, *map(_one, sliced)])
        ys = [None if at in unread else returned(found[at]) for at in range(of_carry, len(found))]
        return [returned(found[at]) for at in moving], ys

    start = [values[of_consts + at] for at in moving]
    length, reverse, unroll = params["length"], params["reverse"], params["unroll"]
    carry, ys = jax.lax.scan(body, start, xs, length=length, reverse=reverse, unroll=unroll)
    after = kept | dict(zip(moving, carry, strict=True)) | {of_carry + i: y for i, y in enumerate(ys)} | handed
    return [after[at] for at in range(len(after))]


def _counts(params: Any) -> tuple[int, int]:
    """How many constants and carried values a scan has."""
    if "ft_in" in params:  # jax 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _unchanged(jaxpr: Any, values: Sequence[Any], outputs: Any, first: int = 0) -> dict[int, Any]:
    """Weights that a computation gives back as it took them, by the number of the output.

    Args:
      jaxpr: of the computation.
      values: of its inputs.
      outputs: numbers of outputs; a dict says which input each must be.
      first: of the inputs that may be handed on.
    """
    found = {}
    for output in outputs:
        at = _origin(jaxpr, jaxpr.outvars[output])
        wanted = outputs[output] == at if isinstance(outputs, dict) else at is not None and at >= first
        if at is not None and wanted and isinstance(values[at], Weight):
            found[output] = values[at]
    return found


def _origin(jaxpr: Any, variable: Any) -> int | None:
    """The number of the input that ``variable`` is, also where inner computations hand it on; None if it is another."""
    if isinstance(variable, core.Literal):
        return None
    if variable in jaxpr.invars:
        return int(jaxpr.invars.index(variable))
    producers = (eqn for eqn in jaxpr.eqns if variable in eqn.outvars)
    for eqn in producers:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is None or eqn.primitive.name not in (*NESTED, *CHECKPOINT, "scan"):
            return None
        inner = getattr(inner, "jaxpr", inner)
        output = eqn.outvars.index(variable)
        at = _origin(inner, inner.outvars[output])
        if at is not None and eqn.primitive.name == "scan":
            of_consts, of_carry = _counts(eqn.params)
            same = at == of_consts + output if output < of_carry else at >= of_consts + of_carry
            at = at if same else None
        return None if at is None else _origin(jaxpr, eqn.invars[at])
    return None


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
    operands, closed = values[1:], eqn.params["branches"]
    outputs = range(len(eqn.outvars))
    handed = [_unchanged(branch.jaxpr, operands, outputs) for branch in closed]
    same = {at: x for at, x in handed[0].items() if all(one.get(at) is x for one in handed)}

    def branch(closed: Any, *given: Any) -> list[Any]:
        found = evaluate(context, closed.jaxpr, closed.consts, given)
        return [None if at in same else returned(value) for at, value in enumerate(found)]

    found = jax.lax.switch(values[0], [partial(branch, one) for one in closed], *operands)
    return [same.get(at, value) for at, value in enumerate(found)]


def while_loop(evaluate: Evaluate, context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """``jax.lax.while_loop`` and ``fori_loop``: weights may be constants of the loop."""
    params = eqn.params
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = values[:of_cond], values[of_cond : of_cond + of_body], values[of_cond + of_body :]
    inner, last = params["body_jaxpr"], params["cond_jaxpr"]
    kept = _unchanged(inner.jaxpr, [*body_consts, *carry], {at: of_body + at for at in range(len(carry))})
    moving = [at for at in range(len(carry)) if at not in kept]
    if any(isinstance(carry[at], Weight) for at in moving):
        return refuse(context, eqn, values, "is carried from step to step of a loop and changed")

    def whole(state: Any) -> list[Any]:
        after = kept | dict(zip(moving, state, strict=True))
        return [after[at] for at in range(len(carry))]

    def again(state: Any) -> Any:
        return returned(evaluate(context, last.jaxpr, last.consts, [*cond_consts, *whole(state)])[0])

    def body(state: Any) -> Any:
        found = evaluate(context, inner.jaxpr, inner.consts, [*body_consts, *whole(state)])
        return [returned(found[at]) for at in moving]

    return whole(jax.lax.while_loop(again, body, [carry[at] for at in moving]))


def custom(evaluate: Evaluate, context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """A function with derivatives of its own, which would be lost: refused."""
    del evaluate
    return refuse(context, eqn, values, "is read by a function with derivatives of its own (custom_jvp or custom_vjp)")


def returned(value: Any) -> Any:
    """An array that leaves the computation.

    Raises:
      InputError: it is a weight with an adapter.
    """
    if isinstance(value, Weight) and value.adapter:
        refused(value.leaf, "is itself an output of the model or of a part of it")
    return dense(value)


RULES: dict[str, Any] = {
    **dict.fromkeys(NESTED, nested),
    **dict.fromkeys(CHECKPOINT, checkpoint),
    "scan": scan,
    "cond": cond,
    "while": while_loop,
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), custom),
}
