"""``bench.py train``: tokens per second, MFU, memory and compile time of a training step, alone or compared with peers.

Each side is a separate process (:mod:`bench.side`). A time is the mean over the steps of a round, which are dispatched
asynchronously as in training. Reported are the median and the quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import get_args

from bench.peers import add_peer_options, parse_peers
from bench.report import format_versions, result, summary, table
from bench.shapes import SHAPES
from bench.turns import OURS, measure_sides
from bench.work import Workload
from stablelora_jax.config.optimizer import CONFIGS
from stablelora_jax.models.attention import KINDS
from stablelora_jax.models.remat import Remat
from stablelora_jax.quantization import FORMATS
from stablelora_jax.training.flops import peak_flops
from stablelora_jax.utils.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of ``bench.py train``."""
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-15m", help="model architecture; weights are random")
    add("--batch", type=int, default=8, metavar="B", help="rows per step (default 8)")
    add("--length", type=int, default=256, metavar="T", help="tokens per row (default 256)")
    add("--documents", type=int, default=1, metavar="N", help="documents packed into each row (default 1)")
    add("--rank", type=int, default=8, metavar="R", help="LoRA rank (default 8)")
    add("--target", default="all-linear", help='module names, comma-separated, or "all-linear" (default)')
    add(
        "--loss-fraction",
        type=float,
        default=1.0,
        metavar="F",
        help="compute the loss on the last fraction F of each document (default 1)",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the base and of the matmuls")
    add("--optimizer", choices=sorted(CONFIGS), default="adamw", help="optimizer of our side; a peer uses AdamW")
    add("--steps", type=int, default=5, metavar="N", help="timed steps per round (default 5)")
    add("--rounds", type=int, default=7, metavar="N", help="rounds per side, interleaved (default 7)")
    add("--remat", choices=get_args(Remat), help="rematerialisation policy of our side (default: chosen by memory)")
    add("--attention", choices=KINDS, help="attention implementation of our side (default: auto)")
    add("--quantize", choices=tuple(FORMATS), help="quantisation of the base, on our side only")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches per step (default 1)")
    add(
        "--devices",
        type=int,
        metavar="N",
        help="devices of our side (default: 1; on a CPU its cores, if they divide B)",
    )
    add_peer_options(add)
    add("--apart", action="store_true", help="run the sides one after the other, if they do not fit in memory together")
    add(
        "--peak-flops",
        type=float,
        metavar="X",
        help="peak FLOP/s of a device (of the whole CPU), for the MFU of an unknown device",
    )
    add("--json", action="store_true", help="print one line of JSON on stdout and the table on stderr")


def work_of(given: argparse.Namespace) -> Workload:
    """The workload that the flags describe.

    Raises:
      InputError: a number is out of range, or the flags of the peers are wrong. Targets are checked by each side.
    """
    for name in ("batch", "length", "documents", "rank", "accumulate", "devices", "steps", "rounds"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(given, name)}")
    if given.length < 2 * given.documents:
        raise InputError(f"--length {given.length} is less than two tokens for each of {given.documents} documents")
    if not 0 < given.loss_fraction <= 1 or round(given.loss_fraction * given.length / given.documents) < 1:
        least = "--loss-fraction must leave at least one loss token"
        raise InputError(f"{least} and be at most 1, not {given.loss_fraction}")
    if given.batch % given.accumulate:
        raise InputError(f"--batch {given.batch} cannot be divided evenly into --accumulate {given.accumulate}")
    if given.devices and given.batch // given.accumulate % given.devices:
        raise InputError(f"--batch {given.batch} cannot be divided evenly over --devices {given.devices}")
    if given.peak_flops is not None and not given.peak_flops > 0:
        raise InputError(f"--peak-flops must be positive, not {given.peak_flops}")
    parse_peers(given)  # only to raise its errors before anything runs
    config = dict(SHAPES[given.shape])
    if given.length > config["max_position_embeddings"]:
        raise InputError(f"--length {given.length} exceeds the model's maximum of {config['max_position_embeddings']}")
    target = given.target if given.target == "all-linear" else [name.strip() for name in given.target.split(",")]
    same = {key: getattr(given, key) for key in Workload.__dataclass_fields__ if key not in ("config", "target")}
    return Workload(**same, config=config, target=target)


def bench(given: argparse.Namespace) -> None:
    """Measure the sides and print the report."""
    work = work_of(given)
    names, interpreters = parse_peers(given)
    found = measure_sides(names, work, given.steps, given.rounds, given.apart, interpreters)
    known = peak_flops(found[OURS]["device"]) if work.dtype == "bfloat16" else None
    sides = {name: summary(side, work, given.peak_flops or known) for name, side in found.items()}
    combined = result(sides, work)
    title = (
        f"{work.shape}, {work.batch} x {work.length} tokens, {work.documents} per row, r={work.rank} {given.target}, "
    )
    title += f"loss on {work.loss_fraction:.0%}, {work.dtype}, {work.optimizer}; {combined['device']}"
    title += f" as {combined['devices']} devices" if combined["devices"] > 1 else ""
    title += f"; {format_versions(sides)}"
    text = f"{title}\n\n{table(sides, combined)}"
    print(text, file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(combined))
