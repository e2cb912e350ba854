"""What can be asked of a combination: every argument in its range, none missing and none without use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stablelora_jax.lora.combine.prune import RULES
from stablelora_jax.utils.errors import InputError

METHODS = (*RULES, "cat", "svd", *(f"{name}_svd" for name in RULES if name != "linear"))


def check(count: int, weights: Any, method: str, rank: Any, density: Any, sign: Any, key: Any, clamp: Any) -> None:
    """Check the arguments of :func:`stablelora_jax.lora.combine.combine` for ``count`` adapters.

    Raises:
      InputError: naming the argument.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if isinstance(weights, str | bytes):
        raise InputError(f"weights must be a list of numbers, not {weights!r:.60}")
    if len(weights) != count:
        raise InputError(f"there are {count} adapters and {len(weights)} weights: give one weight for each")
    for weight in weights:
        if not _is_number(weight) or not math.isfinite(weight):
            raise InputError(f"weights must be finite, not {weight!r:.60}")
    prune = RULES.get(method.removesuffix("_svd"), RULES["linear"]).prune
    if prune and density is None and count > 1:
        raise InputError(f"{method} needs density, the fraction of entries to keep, in (0, 1]")
    if density is not None and not (_is_number(density) and 0 < density <= 1):
        raise InputError(f"density must be in (0, 1], not {density!r}")
    if prune == "random" and key is None and count > 1:
        raise InputError(f"{method} draws random masks: give it a key, such as jax.random.key(0)")
    if sign not in ("total", "frequency"):
        raise InputError(f"sign must be total or frequency, not {sign!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise InputError(f"rank must be a whole number of at least 1, not {rank!r}")
    if clamp is not None and not (_is_number(clamp) and 0 < clamp <= 1):
        raise InputError(f"clamp is a quantile, in (0, 1], not {clamp!r}")
    unused = {"density": density is not None and not prune, "key": key is not None and prune != "random"}
    if not method.endswith("svd") or count == 1:
        unused |= {"rank": rank is not None, "clamp": clamp is not None}
    for name, given in unused.items():
        if given:
            raise InputError(f"{name} is of no use to {method}{' of one adapter' * (count == 1)}: leave it out")


def _is_number(value: Any) -> bool:
    """Whether it is a real number, also as an array without axes."""
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iuf"
