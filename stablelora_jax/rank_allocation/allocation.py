"""What a rank allocation changes in a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax

from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils.errors import InputError

Restart = Callable[[Any, jax.Array, Any], Any]


class Allocation(NamedTuple):
    """What a member changes; a field that is None changes nothing. All of it is pure, its memory is in the state."""

    start: Callable[[Any], Any] | None = None  # of the adapters, before the first step
    seen: Callable[[Any, jax.Array], Any] | None = None  # the adapters as the model sees them, by the step's key
    penalty: Callable[[Any], jax.Array] | None = None  # of the trained leaves, added to the loss
    around: Callable[[optax.GradientTransformation], optax.GradientTransformation] | None = None  # the optimizer
    restarts: Mapping[int, Restart] = MappingProxyType({})  # before these steps (adapters, key, params) -> adapters
    finished: Callable[..., tuple[Any, LoraSpec]] | None = None  # (adapters, spec, params=) as they are saved


def require_parametrization(name: str, spec: LoraSpec, known: Sequence[str], why: str) -> None:
    """Check that a member has a meaning for the parametrisation.

    Raises:
      InputError: it has none.
    """
    if spec.parametrization not in known:
        raise InputError(f"{name} {why}: it is for parametrization {' and '.join(known)}, not {spec.parametrization!r}")
