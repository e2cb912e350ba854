"""The charts of the page of widths: which runs each one shows, its title, and its caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from stablelora_jax.runs.report_charts import Chart, chart
from stablelora_jax.studies import width_panels as panels
from stablelora_jax.studies.slopes import AFTER, EARLY, LATE
from stablelora_jax.studies.width_panels import METHODS

LIMITS = (0.05, 3e3)  # of the two charts of delta1 / delta2 over steps
REGIME = "R3"  # of the regimes the one that violates the condition most


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """The charts of ``results.json``, in the order of the page."""
    every = {config["name"]: config for config in results["settings"]["configs"]}
    runs = {name: [run for run in results["runs"] if run["config"] == name] for name in every}
    e0s = sorted({config["e0"] for config in every.values()}, reverse=True)
    trios = {
        e0: _trio([name for name in every if name.startswith(f"{REGIME} ") and every[name]["e0"] == e0]) for e0 in e0s
    }
    main = {method: runs[name] for method, name in trios[e0s[0]].items()}
    low = {method: runs[name] for method, name in trios[e0s[-1]].items()}
    plain = {name: own for name, own in runs.items() if every[name]["optimizer"] != "stable_lora"}
    plain = {name: own for name, own in plain.items() if every[name]["e0"] == e0s[0]}
    shrunk = {name: own for name, own in runs.items() if every[name]["optimizer"] == "stable_lora"}
    by_e0 = {(method, e0): runs[name] for e0, trio in trios.items() for method, name in trio.items()}
    return [*_against_width(main, plain, shrunk), *_over_steps(main, results["steps"]), *_low(low, by_e0, results, e0s)]


def _trio(names: Sequence[str]) -> dict[str, str]:
    """The config of each method of :data:`METHODS`."""
    return {method: name for method in METHODS for name in names if name.startswith(f"{REGIME} {method}")}


def _against_width(main: Mapping[str, Any], plain: Mapping[str, Any], shrunk: Mapping[str, Any]) -> list[Chart]:
    span = f"Steps {EARLY[0]} to {EARLY[1]}"
    late = partial(panels.methods, groups=main, span="late")
    rms = "RMS of the change of the output"
    return [
        _of(
            "early",
            f"Early: the three terms, {REGIME} with Adam",
            f"{span}. Delta1 grows in proportion to n, delta2 and delta3 hardly depend on it: the wider the layer, the "
            "more a step is one of B alone.",
            partial(panels.deltas, runs=main["Adam"], span="early"),
        ),
        _of(
            "regimes",
            "Early: delta1 in every scaling without a shrink",
            f"{span}. It grows where A starts too large for the learning rate, and not where A starts small.",
            partial(panels.configs, groups=plain, span="early", quantity="delta1"),
        ),
        _of(
            "late",
            f"Late: delta1, {REGIME}",
            f"The last {LATE} steps. Theory: slope +1 with Adam, 0 with the other two. Adam comes close to it only at "
            "widths where the initial A still counts at the end.",
            partial(late, quantity="delta1", ylabel=rms),
        ),
        _of(
            "late-ratio",
            f"Late: delta1 / delta2, {REGIME}",
            f"The last {LATE} steps. Theory: slope +1 with Adam, 0 with the other two, where a step divides its work "
            "between A and B in the same way at every width.",
            partial(late, quantity="ratio", ylabel="delta1 / delta2"),
        ),
        _of(
            "az",
            f"Late: RMS(x A), {REGIME}",
            f"The last {LATE} steps. Theory: slope \N{MINUS SIGN}1 where the initial A no longer counts, 0 with Adam. "
            "Adam's points bend upwards where n is large.",
            partial(late, quantity="az", ylabel="RMS(x A)"),
        ),
        _of(
            "stops",
            "The step in which A stops shrinking",
            "The wider the layer, the longer A shrinks; a smaller e0 makes it longer, too. Points: seeds.",
            partial(panels.stops, groups=shrunk),
        ),
    ]


def _over_steps(main: Mapping[str, Any], steps: Sequence[int]) -> list[Chart]:
    draw = partial(panels.ratios, steps=steps, limits=LIMITS)
    return [
        _of(
            "ratio-adam",
            f"delta1 / delta2 over the steps, {REGIME} with Adam",
            "The curves of wide layers stay far above those of narrow ones to the end.",
            partial(draw, runs=main["Adam"]),
        ),
        _of(
            "ratio-shrink",
            f"delta1 / delta2 over the steps, {REGIME} with Stable-LoRA",
            "Dots: A stops shrinking, in wide layers well below 1. From there on the curves come together.",
            partial(draw, runs=main["Stable-LoRA"]),
        ),
    ]


def _low(low: Mapping[str, Any], by_e0: Any, results: Mapping[str, Any], e0s: Sequence[float]) -> list[Chart]:
    end = f"{REGIME}, e0 = {e0s[-1]:g}"
    widest = results["settings"]["widths"][-1]
    greatest = {key: [run for run in runs if run["width"] == widest] for key, runs in by_e0.items()}
    return [
        _of(
            "overshoot",
            f"Overshoot: x A beside a small A's, {end}",
            "Stable-LoRA's x A over that of Adam from a small A at the same step. Below 1, A has shrunk too far (dots: "
            "it stops), and grows again until the curve is back at 1.",
            partial(panels.overshoot, runs=low["Stable-LoRA"], reference=low["small A"], steps=results["steps"]),
        ),
        _of(
            "after",
            f"Overshoot: the terms after the stop, {end}",
            f"The {AFTER} steps after A has stopped shrinking. Delta1 and delta3 now fall with n: the stop rule bounds "
            "delta1 from above, not from below.",
            partial(panels.deltas, runs=low["Stable-LoRA"], span="after_stop"),
        ),
        _of(
            "losses",
            f"Loss at n = {widest}, {REGIME}",
            "Means over 20 steps; at 0.5 nothing is learnt. While A shrinks, what B has learnt shrinks with it, and "
            "the loss rises for a time. In the end the losses hardly differ, unless the overshoot delays learning.",
            partial(panels.losses, groups=greatest, steps=results["steps"]),
        ),
        _of(
            "assumption",
            f"The assumption: RMS(x dA) / eta, {end}",
            f"Steps {EARLY[0]} to {EARLY[1]}. Theory takes RMS(x dA) to be proportional to eta n, a slope of 1: "
            "gradients of A and inputs are aligned.",
            partial(panels.methods, groups=low, span="early", quantity="a_step", ylabel="RMS(x dA) / eta"),
        ),
    ]


def _of(key: str, title: str, caption: str, draw: Callable[..., None]) -> Chart:
    return chart(f"width-{key}", title, caption, draw)
