"""``bench.py train``: tokens a second, model FLOPs, memory and compile time of a training step, alone or beside peers.

Each side is a process of its own (:mod:`bench.side`). Times are means over the steps of a round, so that steps may
queue up as they do in training; what is said of them are medians and quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import get_args

from bench.peers import add_peer_options, asked
from bench.report import made_of, result, summary, table
from bench.shapes import SHAPES
from bench.turns import OURS, measured
from bench.work import Work
from stablelora_jax.config.optimizer import CONFIGS
from stablelora_jax.models.attention import KINDS
from stablelora_jax.models.remat import Remat
from stablelora_jax.quantization import FORMATS
from stablelora_jax.training.flops import peak_flops
from stablelora_jax.utils.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of ``bench.py train``."""
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-15m", help="whose architecture; weights are random")
    add("--batch", type=int, default=8, metavar="B", help="rows of a step (default 8)")
    add("--length", type=int, default=256, metavar="T", help="tokens of a row (default 256)")
    add("--documents", type=int, default=1, metavar="N", help="texts packed into each row (default 1)")
    add("--rank", type=int, default=8, metavar="R", help="of every pair (default 8)")
    add("--target", default="all-linear", help='module names with commas between, or "all-linear" (default)')
    add(
        "--loss-fraction",
        type=float,
        default=1.0,
        metavar="F",
        help="the last share of each text is learnt (default 1)",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base and of products")
    add("--optimizer", choices=sorted(CONFIGS), default="adamw", help="ours; the peer's is always AdamW")
    add("--steps", type=int, default=5, metavar="N", help="timed steps of a round (default 5)")
    add("--rounds", type=int, default=7, metavar="N", help="rounds of each side, in turn (default 7)")
    add("--remat", choices=get_args(Remat), help="what the backward pass finds again (default: the model's)")
    add("--attention", choices=KINDS, help="how attention is computed (default: the model's)")
    add("--quantize", choices=tuple(FORMATS), help="keep the base in this format, on our side alone")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches of a step (default 1)")
    add("--devices", type=int, metavar="N", help="of our side (default: 1; a CPU's cores, if they divide the rows)")
    add_peer_options(add)
    add("--apart", action="store_true", help="one side after the other, where memory does not hold them together")
    add(
        "--peak-flops",
        type=float,
        metavar="X",
        help="a device's FLOP/s (a whole CPU's), for MFU, where it is not known",
    )
    add("--json", action="store_true", help="one line of JSON on stdout, the table on stderr")


def work_of(given: argparse.Namespace) -> Work:
    """The work that the flags describe.

    Raises:
      InputError: a number out of range. A target that is no linear module, the side itself refuses.
    """
    for name in ("batch", "length", "documents", "rank", "accumulate", "devices", "steps", "rounds"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(given, name)}")
    if given.length < 2 * given.documents:
        raise InputError(f"--length {given.length} is less than two tokens for each of {given.documents} documents")
    if not 0 < given.loss_fraction <= 1 or round(given.loss_fraction * given.length / given.documents) < 1:
        raise InputError(f"--loss-fraction must leave a token to learn and be at most 1, not {given.loss_fraction}")
    if given.batch % given.accumulate:
        raise InputError(f"--batch {given.batch} rows cannot be cut into --accumulate {given.accumulate} alike")
    if given.devices and given.batch // given.accumulate % given.devices:
        raise InputError(f"--batch {given.batch} rows cannot be spread over --devices {given.devices} alike")
    if given.peak_flops is not None and not given.peak_flops > 0:
        raise InputError(f"--peak-flops must be positive, not {given.peak_flops}")
    asked(given)  # refused here, before anything runs
    config = dict(SHAPES[given.shape])
    if given.length > config["max_position_embeddings"]:
        raise InputError(f"--length {given.length} is more than the model's {config['max_position_embeddings']}")
    target = given.target if given.target == "all-linear" else [name.strip() for name in given.target.split(",")]
    same = {key: getattr(given, key) for key in Work.__dataclass_fields__ if key not in ("config", "target")}
    return Work(**same, config=config, target=target)


def bench(given: argparse.Namespace) -> None:
    """What ``bench.py train`` does."""
    work = work_of(given)
    names, pythons = asked(given)
    found = measured(names, work, given.steps, given.rounds, given.apart, pythons)
    known = peak_flops(found[OURS]["device"]) if work.dtype == "bfloat16" else None
    sides = {name: summary(side, work, given.peak_flops or known) for name, side in found.items()}
    whole = result(sides, work)
    about = f"{work.shape}, {work.batch} x {work.length} tokens, {work.documents} a row, r={work.rank} {given.target}, "
    about += f"loss on {work.loss_fraction:.0%}, {work.dtype}, {work.optimizer}; {whole['device']}"
    about += f" as {whole['devices']} devices" if whole["devices"] > 1 else ""
    about += f"; {made_of(sides)}"
    text = f"{about}\n\n{table(sides, whole)}"
    print(text, file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(whole))
