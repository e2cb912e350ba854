"""Exponents of power laws in the width: least squares in log-log, and what theory says.

Theory is that of Stable-LoRA, arXiv 2603.05204, section 3: with ``gamma[v]`` the exponent of v in n, exponents add in a
product and the greatest wins in a sum; x A grows by ``gamma[eta] + 1`` in a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from stablelora_jax.studies.width_scaling import Config

EARLY = (2, 6)  # steps, both included; in step 1 B is zero and so is delta2
LATE = 50  # the last steps
AFTER = 10  # steps after A has stopped shrinking
QUANTITIES = ("delta1", "delta2", "delta3", "az", "b", "a_step")


class Slope(NamedTuple):
    """An exponent with its 95 % confidence interval; the interval is None where fewer than three points were fitted."""

    slope: float
    low: float | None
    high: float | None


def fit(widths: ArrayLike, values: ArrayLike) -> Slope:
    """The exponent p of ``value ~ width^p``.

    Args:
      widths: positive, at least two different ones.
      values: positive, one for each of ``widths``; widths repeat where there are several seeds.

    Returns:
      Least squares of log value on log width over all points, and Student's interval, which takes the points to be
      independent with equal spread in the logarithm.

    Example::

      >>> [round(fit((1, 2, 4), (3, 12, 48)).slope, 6), fit((1, 2), (1, 2)).low]
      [2.0, None]
    """
    from scipy.special import stdtrit

    x, y = np.log(np.asarray(widths, float)), np.log(np.asarray(values, float))
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    free = len(x) - 2
    if free < 1:
        return Slope(slope, None, None)
    residual = y - y.mean() - slope * x
    half = float(stdtrit(free, 0.975) * np.sqrt(residual @ residual / free / (x @ x)))
    return Slope(slope, slope - half, slope + half)


def windows(measured: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Geometric means over the early, the late and, where A stopped shrinking in time, the steps just after that.

    Args:
      measured: of :func:`stablelora_jax.studies.width_scaling.measure`.

    Returns:
      ``{"early" | "late" | "after_stop": {quantity: mean}}``, with ``ratio`` for delta1 over delta2.
    """
    steps, stop = len(measured["loss"]), stop_step(measured)
    spans = {"early": slice(EARLY[0] - 1, EARLY[1]), "late": slice(steps - LATE, steps)}
    if stop is not None and stop - 1 + AFTER <= steps:
        spans["after_stop"] = slice(stop - 1, stop - 1 + AFTER)
    return {name: _means(measured, span) for name, span in spans.items()}


def _means(measured: Mapping[str, np.ndarray], span: slice) -> dict[str, float]:
    found = {name: float(np.exp(np.log(measured[name][span]).mean())) for name in QUANTITIES}
    return found | {"ratio": found["delta1"] / found["delta2"]}


def stop_step(measured: Mapping[str, np.ndarray]) -> int | None:
    """The first step, from 1, in which A no longer shrank; None where it never shrank or shrinks to the end."""
    stopped = measured["stopped"]
    return int(np.argmax(stopped)) + 1 if stopped.any() else None


def theory(config: Config) -> dict[str, dict[str, float]]:
    """The exponents for n to infinity, by window and quantity as in :func:`windows`.

    ``late`` is long after A has stopped shrinking, or without a shrink the greater of what A began with and of what
    it has learnt; there is none for ``after_stop``, which is late for theory.
    """
    learnt = config.eta + 1  # of x A, where the initial A no longer counts
    az = learnt if config.shrink_ratio else max(config.a0, learnt)
    b_terms = config.scale + config.b_exponent
    same = {"delta2": b_terms + learnt, "delta3": b_terms + learnt, "b": config.b_exponent, "a_step": 1.0}
    early = {"delta1": b_terms + config.a0, "az": config.a0, "ratio": config.a0 - learnt, **same}
    late = {"delta1": b_terms + az, "az": az, "ratio": az - learnt, **same}
    return {"early": early, "late": late, "after_stop": late}
