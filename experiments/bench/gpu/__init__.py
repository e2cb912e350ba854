"""``bench.py gpu``: everything that is to be known of a GPU, by one command that may be cut off and started again.

    python experiments/bench.py gpu --output build/gpu

A list of measurements (``suite.py``), most wanted first. Each is a process of its own with a time limit, and writes
``DIR/rows/NAME.json`` the moment that it is done; ``DIR/report.md`` is written anew after each. Started again, the
command goes on with what is missing, or had no package; ``--retry`` measures once more what failed. What runs out of
memory is tried with half the batch. What is not timed (``right``) runs three at a time, all else alone. ``--rehearse``
runs every measurement on a CPU, with toy shapes.

What must travel to a machine without a network: ``stablelora_jax experiments configs pyproject.toml`` (a few MB; no
data, no weights: models are drawn at random there). What must be installed there: jax with its CUDA plug-in, and what
``REQUIRED`` names, which is looked for first; for the peer torch and peft, without which its rows say so. Wheels of
what is missing may travel: ``pip download --no-deps -d wheels NAME`` here, ``pip install --no-deps --target site
wheels/*.whl`` there, and ``site`` in PYTHONPATH. google-tunix may live in an environment of its own: ``--peer-python``.

Where a machine is to be had for ten minutes a call, make two calls without a pause, with an output that stays there in
between (else carry it back there), and keep what each has brought::

    export PYTHONPATH=.:site:$PYTHONPATH
    python3 experiments/bench.py gpu --output build/gpu --budget-minutes 9; tar czf "$OUT/gpu.tgz" build/gpu

The first call reaches ``right`` and most of what stands beside the peers; the second the rest, the marks and perhaps
the profile. A third, or a longer budget, reaches generation, loading, checkpoints, banks and the remat policies.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu import rows
from bench.gpu.report import report
from bench.gpu.runner import Session, run
from bench.gpu.suite import BROKEN, RIGHT, Measurement, suite
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, write_whole

REQUIRED = ("flax", "optax", "orbax", "chex", "transformers", "tokenizers", "safetensors", "huggingface_hub", "yaml")
REQUIRED += ("beartype", "regex", "jinja2", "tqdm", "matplotlib")
TOY_SECONDS = 120.0  # the time limit of every row of a rehearsal


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of ``bench.py gpu``."""
    add = parser.add_argument
    add("--output", metavar="DIR", help="where rows and report.md are written; a rehearsal may do without")
    add("--budget-minutes", type=float, default=25, metavar="M", help="end after so long, at most (default 25)")
    add("--only", metavar="NAMES", help="only these rows, by name or by prefix, with commas between")
    add("--retry", action="store_true", help="measure again the rows that failed")
    add("--rehearse", action="store_true", help="every row on the CPU with toy shapes, two at a time")
    add("--row-seconds", type=float, metavar="S", help="the time limit of every row (default: each row's own)")
    add("--peer-python", metavar="PATH", help="the interpreter of the environment that holds google-tunix")
    add("--spoil", action="append", default=[], metavar="NAME=HOW", help=f"make a row {', '.join(BROKEN)} on purpose")
    add("--list", action="store_true", help="print the names of the rows, and end")


def bench(given: argparse.Namespace) -> None:
    """What ``bench.py gpu`` does."""
    every = suite()
    wanted, spoil = chosen(every, given.only), spoiled(every, given.spoil)
    if given.list:
        print("\n".join(one.name for one in wanted))
        return
    _check(given)
    place = tempfile.mkdtemp(prefix="rehearsal-") if given.output is None else given.output
    with rows.opened(as_path(place, "--output").absolute(), given.rehearse) as output:

        def tell() -> None:
            try:
                write_whole(output / "report.md", report(every, rows.read(output)))
            except InputError:  # a file that somebody has damaged
                raise
            except Exception:  # the rows are what counts; the next call writes the report
                traceback.print_exc()

        session = Session(output, time.monotonic() + 60 * given.budget_minutes, given.rehearse, report=tell)
        session.limit = given.row_seconds or (TOY_SECONDS if given.rehearse else None)
        session.spoil, session.command = spoil, command(given)
        session.pythons = {"tunix": given.peer_python} if given.peer_python else {}
        tell()
        measure(session, wanted, given.retry)
        print(summed(wanted, rows.read(output), output))


def _check(given: argparse.Namespace) -> None:
    """Refuse numbers and paths that cannot be used, and a machine that lacks what most rows need."""
    if missing := [name for name in REQUIRED if find_spec(name) is None]:
        raise InputError(f"not installed here: {', '.join(missing)}: bring their wheels, see {__file__}")
    for name in ("budget_minutes", "row_seconds"):
        if getattr(given, name) is not None and not getattr(given, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, not {getattr(given, name)}")
    if given.peer_python is not None and not as_path(given.peer_python, "--peer-python").is_file():
        raise InputError(f"--peer-python {given.peer_python} is no file: name an interpreter")
    if given.output is None and not given.rehearse:
        raise InputError("--output DIR is missing: it says where rows and report.md are written")


def measure(session: Session, wanted: list[Measurement], retry: bool) -> None:
    """What is missing of ``wanted`` or had no package, with ``retry`` also what failed; ``right`` side by side."""
    found = rows.read(session.output)
    once_more = ("absent", "failed", "timeout", "memory") if retry else ("absent",)
    session.again = frozenset(name for name, row in found.items() if row["status"] in once_more)
    left = [one for one in wanted if one.name not in found or one.name in session.again]
    untimed = [one for one in left if one.section == RIGHT]
    try:
        run(session, untimed, jobs=2 if session.toy else 3)
        run(session, [one for one in left if one not in untimed], jobs=2 if session.toy else 1)
    finally:
        session.report()


def chosen(every: list[Measurement], only: str | None) -> list[Measurement]:
    """The rows that ``--only`` names, by whole names or beginnings.

    Raises:
      InputError: a name that is none.
    """
    if only is None:
        return every
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if not name or not any(_named(one, name) for one in every):
            raise InputError(f"--only: no row is called {name!r} or begins so: see --list")
    return [one for one in every if any(_named(one, name) for name in names)]


def _named(one: Measurement, name: str) -> bool:
    return one.name == name or one.name.startswith(name.rstrip(".") + ".")


def spoiled(every: list[Measurement], given: list[str]) -> dict[str, str]:
    """``{row: how}`` of ``--spoil``.

    Raises:
      InputError: no such row, or no such way.
    """
    pairs = dict(text.partition("=")[::2] for text in given)
    for name, how in pairs.items():
        if name not in {one.name for one in every} or how not in BROKEN:
            raise InputError(f"--spoil takes NAME=HOW, HOW one of {', '.join(BROKEN)}, not {name}={how}")
    return pairs


def command(given: argparse.Namespace) -> str:
    """The command that measures one row again; ``{name}`` stands for it."""
    words = ["python", "experiments/bench.py", "gpu", "--output", "DIR", *(["--rehearse"] if given.rehearse else [])]
    return shlex.join(words) + " --only {name}"


def summed(wanted: list[Measurement], found: dict[str, Any], output: Path) -> str:
    """One line for people."""
    counts: dict[str, int] = {}
    for one in wanted:
        kind = found[one.name]["status"] if one.name in found else "not reached"
        counts[kind] = counts.get(kind, 0) + 1
    wrong = [name for name, row in found.items() if row["status"] == "done" and row["measured"].get("ok") is False]
    if wrong:
        print(f"WRONG: {', '.join(wrong)}", file=sys.stderr)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) + f": {output / 'report.md'}"
