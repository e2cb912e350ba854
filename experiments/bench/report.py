"""What ``bench.py train`` says of the sides: medians and quartiles over the rounds, MFU, ratios, a table.

A ratio is the median of the ratios of each round, of our side to a peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.turns import OURS
from bench.work import Work
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.training.flops import flops_per_token


def summary(found: dict[str, Any], work: Work, peak: float | None) -> dict[str, Any]:
    """What is reported of a side, from what :func:`measured` gives; ``peak`` is a device's FLOP/s."""
    low, middle, high = quartiles(found["round_seconds"])
    config = decoder_config(work.config, work.shape)
    share = {"loss_fraction": work.loss_fraction, "frozen": found.get("held", 0)}
    flops = flops_per_token(config, found["lora_parameters"], work.attended, **share)
    rate, devices = work.tokens_per_step / middle, found.get("devices", 1)
    peak = peak and peak * (1 if found["device"] == "cpu" else devices)  # a CPU is cut into devices
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


def result(sides: dict[str, dict[str, Any]], work: Work) -> dict[str, Any]:
    """The one line of JSON: our side, ``peers`` with the ratios to each, ``peer`` the fastest, with its ratios here."""
    ours, peers = sides[OURS], {name: side for name, side in sides.items() if name != OURS}
    about = {key: value for key, value in vars(work).items() if key not in ("config", "devices")}
    if not peers:
        return {**ours, **about}
    peers = {name: {**side, **ratios(ours, side)} for name, side in peers.items()}
    best = min(peers, key=lambda name: peers[name]["step_seconds"])
    return {**ours, **about, "peer": {"name": best, **peers[best]}, "peers": peers, **ratios(ours, peers[best])}


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """How often faster our side is than a peer, and what of its memory it takes."""
    rounds = [b / a for a, b in zip(ours["round_seconds"], peer["round_seconds"], strict=True)]
    low, middle, high = quartiles(rounds)
    found: dict[str, Any] = {"ratio": middle, "ratio_quartiles": [low, high], "ratio_rounds": rounds}
    held = [side["peak_memory_bytes"] for side in (ours, peer)]
    found["memory_ratio"] = held[0] / held[1] if all(held) else None
    if ours.get("steps_bytes") and peer.get("steps_bytes"):
        beyond = [side["steps_bytes"] - side["before_bytes"] for side in (ours, peer)]
        found["memory_ratio_beyond_imports"] = beyond[0] / beyond[1]
    return found


def made_of(sides: dict[str, dict[str, Any]]) -> str:
    """The versions of everything; a peer's that is not ours with the name of the peer."""
    found: dict[str, str] = {}
    for name, side in sides.items():
        for key, value in side["versions"].items():
            if found.setdefault(key, value) != value:
                found[f"{name}'s {key}"] = value
    return ", ".join(f"{key} {value}" for key, value in found.items())


def table(sides: dict[str, dict[str, Any]], whole: dict[str, Any]) -> str:
    """The sides as Markdown, and beneath it the ratios."""
    lines = ["| | tokens/s | step, ms (quartiles) | MFU | peak memory, MB | compile, s |", "| --- " * 6 + "|"]
    for name, side in sides.items():
        low, high = (f"{1e3 * value:.1f}" for value in side["step_seconds_quartiles"])
        step, mfu = f"{1e3 * side['step_seconds']:.1f} ({low} to {high})", side["mfu"]
        memory = side["peak_memory_bytes"]
        if side.get("steps_bytes"):
            more = side["steps_bytes"] - side["before_bytes"]
            held = f"{memory / 1e6:.0f} (steps alone {side['steps_bytes'] / 1e6:.0f}, {more / 1e6:.0f} beyond imports)"
        else:
            held = "-" if memory is None else f"{memory / 1e6:.0f}"
        share = "-" if mfu is None else f"{100 * mfu:.1f} %"
        row = (name, f"{side['tokens_per_second']:,.0f}", step, share, held, f"{side['compile_seconds']:.1f}")
        lines.append(f"| {' | '.join(row)} |")
    found = [said(name, peer) for name, peer in whole.get("peers", {}).items()]
    return "\n\n".join(["\n".join(lines), *found])


def said(name: str, peer: dict[str, Any]) -> str:
    """A line of the ratios to a peer."""
    low, high = peer["ratio_quartiles"]
    line = f"{peer['ratio']:.2f} times {name} (quartiles {low:.2f} to {high:.2f})"
    if peer["memory_ratio"] is not None:
        line += f", {peer['memory_ratio']:.2f} of its peak memory"
    if "memory_ratio_beyond_imports" in peer:
        line += f" ({peer['memory_ratio_beyond_imports']:.2f} of the steps' beyond imports)"
    return line
