"""The report of ``bench.py train``: medians and quartiles over the rounds, MFU, ratios, a table.

A ratio compares our side with a peer: the median of the ratios of the single rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.turns import OURS
from bench.work import Workload
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.training.flops import flops_per_token


def summary(found: dict[str, Any], work: Workload, peak: float | None) -> dict[str, Any]:
    """The reported numbers of a side, from its entry in ``measure_sides``; ``peak`` is the FLOP/s of one device."""
    low, middle, high = quartiles(found["round_seconds"])
    config = decoder_config(work.config, work.shape)
    share = {"loss_fraction": work.loss_fraction, "frozen": found.get("frozen_lora_parameters", 0)}
    flops = flops_per_token(config, found["lora_parameters"], work.mean_attended_length, **share)
    rate, devices = work.tokens_per_step / middle, found.get("devices", 1)
    peak = peak and peak * (1 if found["device"] == "cpu" else devices)  # the devices of a CPU are parts of it
    return {
        "tokens_per_second": rate,
        "step_seconds": middle,
        "step_seconds_quartiles": [low, high],
        "mfu": rate * flops / peak if peak else None,
        "peak_memory_bytes": found["peak_memory_bytes"],
        "compile_seconds": found["compile_seconds"],
        "devices": devices,
        **{key: found[key] for key in ("device", "lora_parameters", "versions", "round_seconds")},
        "model_flops_per_token": flops,
        **({key: found[key] for key in ("steps_bytes", "before_bytes")} if "steps_bytes" in found else {}),
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def result(sides: dict[str, dict[str, Any]], work: Workload) -> dict[str, Any]:
    """The line of JSON: our side and the workload; ``peers`` with the ratios to each; the fastest as ``peer``.

    The top-level ratios are those to the fastest peer.
    """
    ours, peers = sides[OURS], {name: side for name, side in sides.items() if name != OURS}
    workload = {key: value for key, value in vars(work).items() if key not in ("config", "devices")}
    if not peers:
        return {**ours, **workload}
    peers = {name: {**side, **ratios(ours, side)} for name, side in peers.items()}
    best = min(peers, key=lambda name: peers[name]["step_seconds"])
    return {**ours, **workload, "peer": {"name": best, **peers[best]}, "peers": peers, **ratios(ours, peers[best])}


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """The speed-up of our side over a peer, and the ratio of our peak memory to the peer's."""
    rounds = [b / a for a, b in zip(ours["round_seconds"], peer["round_seconds"], strict=True)]
    low, middle, high = quartiles(rounds)
    found: dict[str, Any] = {"ratio": middle, "ratio_quartiles": [low, high], "ratio_rounds": rounds}
    peaks = [side["peak_memory_bytes"] for side in (ours, peer)]
    found["memory_ratio"] = peaks[0] / peaks[1] if all(peaks) else None
    if ours.get("steps_bytes") and peer.get("steps_bytes"):
        beyond = [side["steps_bytes"] - side["before_bytes"] for side in (ours, peer)]
        found["memory_ratio_beyond_imports"] = beyond[0] / beyond[1]
    return found


def format_versions(sides: dict[str, dict[str, Any]]) -> str:
    """All package versions in one line; a peer's version that differs from ours is marked with the peer's name."""
    found: dict[str, str] = {}
    for name, side in sides.items():
        for key, value in side["versions"].items():
            if found.setdefault(key, value) != value:
                found[f"{name}'s {key}"] = value
    return ", ".join(f"{key} {value}" for key, value in found.items())


def table(sides: dict[str, dict[str, Any]], combined: dict[str, Any]) -> str:
    """The sides as a Markdown table, followed by the ratios."""
    lines = ["| | tokens/s | step, ms (quartiles) | MFU | peak memory, MB | compile, s |", "| --- " * 6 + "|"]
    for name, side in sides.items():
        low, high = (f"{1e3 * value:.1f}" for value in side["step_seconds_quartiles"])
        step, mfu = f"{1e3 * side['step_seconds']:.1f} ({low} to {high})", side["mfu"]
        memory = side["peak_memory_bytes"]
        if side.get("steps_bytes"):
            more = side["steps_bytes"] - side["before_bytes"]
            peak = f"{memory / 1e6:.0f} (steps only {side['steps_bytes'] / 1e6:.0f}, {more / 1e6:.0f} without imports)"
        else:
            peak = "-" if memory is None else f"{memory / 1e6:.0f}"
        share = "-" if mfu is None else f"{100 * mfu:.1f} %"
        row = (name, f"{side['tokens_per_second']:,.0f}", step, share, peak, f"{side['compile_seconds']:.1f}")
        lines.append(f"| {' | '.join(row)} |")
    found = [format_ratios(name, peer) for name, peer in combined.get("peers", {}).items()]
    return "\n\n".join(["\n".join(lines), *found])


def format_ratios(name: str, peer: dict[str, Any]) -> str:
    """The ratios to a peer in one line."""
    low, high = peer["ratio_quartiles"]
    line = f"{peer['ratio']:.2f} times the speed of {name} (quartiles {low:.2f} to {high:.2f})"
    if peer["memory_ratio"] is not None:
        line += f", {peer['memory_ratio']:.2f} of its peak memory"
    if "memory_ratio_beyond_imports" in peer:
        line += f" ({peer['memory_ratio_beyond_imports']:.2f} for the steps only, without imports)"
    return line
