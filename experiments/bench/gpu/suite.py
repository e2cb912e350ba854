"""The list of measurements, in order of priority.

The benchmarks with an explicit remat policy come last: there are twenty-five of them, and the profile, a single row, is
more useful for deciding what to optimise next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.gpu.training import summary

RIGHT = "Correctness"
PEERS = "Comparison with peers"
MARKS = "Published benchmarks"
PROFILE = "Profile of a training step"
SERVING = "Generation, loading, checkpoints, adapter banks"
FAILURES = ("crash", "hang", "memory")  # that --spoil can inject
POLICIES = ("everything", "save_dots", "no_mlp", "attention", "nothing")
TOY: Mapping[str, Any] = {"toy": True, "length": 64, "steps": 1, "rounds": 2}


@dataclass(frozen=True)
class Measurement:
    """One row."""

    name: str
    section: str
    function: str  # module:function, called with ``arguments`` in a child process
    arguments: Mapping[str, Any]
    toy: Mapping[str, Any] = field(default_factory=dict)  # arguments that replace these in a rehearsal
    seconds: float = 150  # time limit; the row is not started if less than 0.4 of it is left of the budget
    summary: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None  # applied to the result
    python: str | None = None  # the peer whose interpreter runs it


def correctness() -> Iterator[Measurement]:
    """Correctness checks, before any speed is measured."""
    limits = {"right:logits": 150, "right_attention:attention": 120, "right:optimizers": 240}
    for function, seconds in {**limits, "right:quantized": 120, "right:layouts": 120}.items():
        name = f"right.{function.partition(':')[2]}"
        yield Measurement(name, RIGHT, f"bench.gpu.{function}", {}, {"toy": True}, seconds)
    yield Measurement("right.resume", RIGHT, "bench.gpu.restart:resume", {"steps": 40}, {"steps": 8}, 240)


def training(name: str, section: str, side: str = "ours", seconds: float = 150, **arguments: Any) -> Measurement:
    """A row of training throughput."""
    common = {"side": side, "rank": 16, "dtype": "bfloat16", "documents": 1, "steps": 5, "rounds": 5}
    dtype = {} if section == PEERS else {"dtype": "float32"}  # compiles faster on a CPU
    toy = {**TOY, "batch": 2 * arguments.get("accumulate", 1), **dtype}
    python = side if side == "tunix" else None
    options: dict[str, Any] = {"seconds": seconds, "summary": summary, "python": python}
    return Measurement(name, section, "bench.gpu.training:train", {**common, **arguments}, toy, **options)


def comparison(shape: str, documents: int, sides: dict[str, tuple[str, str]], kind: str = "") -> Iterator[Measurement]:
    """Our side and the peers on one shape, 8 rows of 2048 tokens."""
    for name, (side, optimizer) in sides.items():
        more = {"shape": shape, "batch": 8, "length": 2048, "documents": documents, "optimizer": optimizer}
        yield training(f"train.{shape}{kind}.{name}", PEERS, side, 240 if "compile" in side else 150, **more)


def marks(policy: str) -> Iterator[Measurement]:
    """The workloads of published benchmarks, with the settings that their authors give."""
    remat = {} if policy == "auto" else {"remat": policy}
    pages: dict[str, dict[str, Any]] = {f"qwen3-{size}": QWEN3 for size in ("0.6b", "1.7b", "4b", "8b")}
    for shape, page in {"llama3.1-8b": LLAMA_8B, **pages}.items():
        more = {"shape": shape, "optimizer": "adamw", **page, **remat}
        yield training(f"mark.{shape}.{policy}", MARKS, seconds=300 if "8b" in shape else 180, **more)


LLAMA_8B: Mapping[str, Any] = {"batch": 32, "accumulate": 16, "length": 4096, "steps": 1, "rounds": 2}  # NeMo AutoModel
QWEN3: Mapping[str, Any] = {"batch": 8, "accumulate": 4, "length": 2048, "documents": 4, "steps": 2}  # surogate
OURS = {name: ("ours", name) for name in ("adamw", "stable_lora", "lora_rite")}
PEFT = {"peft-eager": ("peft eager", "adamw"), "peft-compile": ("peft compile", "adamw")}
SERVED: Mapping[str, Any] = {"shape": "llama3.2-1b", "dtype": "bfloat16"}


def serving() -> Iterator[Measurement]:
    """Everything outside the training step: generation, loading, checkpoints, adapter banks."""
    for name in ("generation", "loading", "saving", "bank"):
        yield Measurement(
            f"serve.{name}",
            SERVING,
            f"bench.gpu.serving:{name}",
            SERVED,
            {"toy": True},
            300 if name == "generation" else 180,
        )


def suite() -> list[Measurement]:
    """All rows, in the order of measurement."""
    step = {"shape": "llama3.2-1b", "batch": 8, "length": 2048, "documents": 4, "rank": 16, "dtype": "bfloat16"}
    profile = {**step, "optimizer": "stable_lora", "steps": 3}
    small = {"toy": True, "batch": 2, "length": 64}
    rows = [*correctness()]
    for shape in ("qwen2-0.5b", "llama3.2-1b"):
        rows += comparison(shape, 4, OURS | PEFT)
    rows += marks("auto")
    rows.append(Measurement("profile.llama3.2-1b", PROFILE, "bench.gpu.profile:profile", profile, small, 240))
    rows += serving()
    rows += comparison("llama3.2-1b", 1, {"adamw": ("ours", "adamw"), **PEFT}, "-unpacked")
    rows += comparison("llama3.2-1b", 4, {"tunix": ("tunix", "adamw")})
    for policy in POLICIES:
        rows += marks(policy)
    return rows
