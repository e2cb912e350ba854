"""What every rule of the interpreter is given, how it evaluates an equation as it is, and how it refuses one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from jax.extend import core

from stablelora_jax.lora.trace.weight import Atom, Leaf, Weight, dense
from stablelora_jax.utils.errors import InputError

Equation = Any  # jax.extend.core.JaxprEqn


class Use(NamedTuple):
    """How one equation reads a leaf: its axes by what happens to them. Found while nothing is adapted yet."""

    kind: str  # the operation
    stack: frozenset[int] = frozenset()  # scanned, or batch axes of a product
    taken: frozenset[int] = frozenset()  # of which a slice takes one index
    rows: frozenset[int] = frozenset()  # contracted, or looked up
    columns: frozenset[int] = frozenset()  # in the output
    refused: str = ""  # why no pair can follow


@dataclass(frozen=True)
class Context:
    """What the rules share. With ``record`` nothing is adapted: uses are recorded, and the base is computed."""

    parametrization: Any = None  # a member of PARAMETRIZATIONS
    key_impl: Any = None  # of the dropout keys
    record: Callable[[Leaf, Use], None] | None = None
    observe: Callable[..., Any] | None = None  # of an Adapted; it is given the change of a product as its output


def evaluated(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """The outputs of an equation for arrays; weights among ``values`` are read as their arrays."""
    given: dict[Any, Any] = {}
    for variable, value in zip(eqn.invars, values, strict=True):
        if not isinstance(variable, core.Literal):
            given[variable] = dense(value)
    wanted = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
    one = core.Jaxpr((), list(given), wanted, [eqn], eqn.effects)
    found = iter(core.jaxpr_as_fun(core.ClosedJaxpr(one, ()))(*given.values()))
    return [None if isinstance(v, core.DropVar) else next(found) for v in eqn.outvars]


def refuse(context: Context, eqn: Equation, values: Sequence[Any], why: str) -> list[Any]:
    """Raise, or record why no pair can follow and evaluate the base.

    Raises:
      InputError: naming the leaf, the reason and what to do.
    """
    weights = [value for value in values if isinstance(value, Weight)]
    if context.record is None and (adapted := [weight for weight in weights if weight.adapter]):
        refused(adapted[0].leaf, why)
    for weight in weights:
        if context.record is not None:
            context.record(weight.leaf, Use("product" if _multiplies(eqn) else eqn.primitive.name, refused=why))
    return evaluated(eqn, values)


def _multiplies(eqn: Equation) -> bool:
    """Whether an equation is a product or holds one."""
    if eqn.primitive.name in ("dot_general", "conv_general_dilated", "ragged_dot_general", "pallas_call"):
        return True
    inner = [getattr(one, "jaxpr", one) for one in core.jaxprs_in_params(eqn.params)]
    return any(_multiplies(one) for jaxpr in inner for one in jaxpr.eqns)


def refused(leaf: Leaf, why: str) -> NoReturn:
    """Say that no pair can follow.

    Raises:
      InputError: always.
    """
    raise InputError(
        f"{leaf.name} {why}, which a pair cannot follow: put it in exclude_modules, "
        f"or have it merged inside apply: adapted(model, spec, merged=({leaf.name!r},))"
    )


def axes_of(atoms: Sequence[Atom]) -> frozenset[int]:
    """The axes of the leaf that ``atoms`` are of."""
    return frozenset(atom.axis for atom in atoms)
