"""``bench.py gpu``: the complete GPU suite in one command, which resumes where it was interrupted.

    python experiments/bench.py gpu --output build/gpu

The measurements are listed in ``suite.py`` in order of priority. Each runs in a child process with a time limit and
writes ``DIR/rows/NAME.json`` as soon as it is done; ``DIR/report.md`` is rewritten after each. Started again, the
command continues with the rows that are missing or lacked a package; ``--retry`` repeats those that failed. A row that
runs out of memory is repeated with half the batch. The correctness rows (``right``) run three at a time, all others
alone. ``--rehearse`` runs every row on a CPU with toy shapes.

To run on a machine without network access, copy ``stablelora_jax experiments configs pyproject.toml`` (a few MB; no
data and no weights are needed, models are initialised at random). Required there: jax with its CUDA plug-in and the
packages of ``REQUIRED``, which are checked first; for the peer torch and peft, else its rows are marked ``absent``.
Wheels can be copied too: ``pip download --no-deps -d wheels NAME`` here, ``pip install --no-deps --target site
wheels/*.whl`` there, and ``site`` in PYTHONPATH. google-tunix may be in another environment: ``--peer-python``.

If the machine is available for ten minutes at a time, make two calls in direct succession with the same output
directory (copy it back if the machine does not keep it), and save the output of each::

    export PYTHONPATH=.:site:$PYTHONPATH
    python3 experiments/bench.py gpu --output build/gpu --budget-minutes 9; tar czf "$OUT/gpu.tgz" build/gpu

The first call completes ``right`` and most of the comparison with peers; the second the rest of it, the published
benchmarks and perhaps the profile. A third call, or a larger budget, completes generation, loading, checkpoints,
adapter banks and the remat policies.
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
from bench.gpu.suite import FAILURES, RIGHT, Measurement, suite
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, write_whole

REQUIRED = ("flax", "optax", "orbax", "chex", "transformers", "tokenizers", "safetensors", "huggingface_hub", "yaml")
REQUIRED += ("beartype", "regex", "jinja2", "tqdm", "matplotlib")
TOY_SECONDS = 120.0  # time limit of every row in a rehearsal


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of ``bench.py gpu``."""
    add = parser.add_argument
    add("--output", metavar="DIR", help="directory for the rows and report.md; optional in a rehearsal")
    add("--budget-minutes", type=float, default=25, metavar="M", help="time limit of the whole call (default 25)")
    add("--only", metavar="NAMES", help="run only these rows: names or prefixes, comma-separated")
    add("--retry", action="store_true", help="repeat the rows that failed")
    add("--rehearse", action="store_true", help="run every row on the CPU with toy shapes, two at a time")
    add("--row-seconds", type=float, metavar="S", help="time limit of every row (default: each row's own)")
    add("--peer-python", metavar="PATH", help="Python interpreter of the environment with google-tunix")
    failures = ", ".join(FAILURES)
    add("--spoil", action="append", default=[], metavar="NAME=HOW", help=f"inject a failure into a row: {failures}")
    add("--list", action="store_true", help="print the names of the rows and exit")


def bench(given: argparse.Namespace) -> None:
    """Run the suite, or what is missing of it."""
    every = suite()
    wanted, spoil = select_rows(every, given.only), parse_failures(every, given.spoil)
    if given.list:
        print("\n".join(one.name for one in wanted))
        return
    _check(given)
    directory = tempfile.mkdtemp(prefix="rehearsal-") if given.output is None else given.output
    with rows.opened(as_path(directory, "--output").absolute(), given.rehearse) as output:

        def write_report() -> None:
            try:
                write_whole(output / "report.md", report(every, rows.read(output)))
            except InputError:  # a damaged row
                raise
            except Exception:  # must not lose the rows; the next call writes the report
                traceback.print_exc()

        session = Session(output, time.monotonic() + 60 * given.budget_minutes, given.rehearse, report=write_report)
        session.limit = given.row_seconds or (TOY_SECONDS if given.rehearse else None)
        session.spoil, session.command = spoil, command(given)
        session.interpreters = {"tunix": given.peer_python} if given.peer_python else {}
        write_report()
        measure(session, wanted, given.retry)
        print(summary_line(wanted, rows.read(output), output))


def _check(given: argparse.Namespace) -> None:
    """Check the flags, and that the packages that most rows need are installed."""
    if missing := [name for name in REQUIRED if find_spec(name) is None]:
        raise InputError(f"not installed here: {', '.join(missing)}: install their wheels, see {__file__}")
    for name in ("budget_minutes", "row_seconds"):
        if getattr(given, name) is not None and not getattr(given, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, not {getattr(given, name)}")
    if given.peer_python is not None and not as_path(given.peer_python, "--peer-python").is_file():
        raise InputError(f"--peer-python {given.peer_python} is not a file: give a Python interpreter")
    if given.output is None and not given.rehearse:
        raise InputError("--output DIR is missing: the directory for the rows and report.md")


def measure(session: Session, wanted: list[Measurement], retry: bool) -> None:
    """Measure the ``wanted`` rows that are missing or lacked a package; with ``retry`` also those that failed."""
    found = rows.read(session.output)
    repeated = ("absent", "failed", "timeout", "memory") if retry else ("absent",)
    session.again = frozenset(name for name, row in found.items() if row["status"] in repeated)
    left = [one for one in wanted if one.name not in found or one.name in session.again]
    untimed = [one for one in left if one.section == RIGHT]
    try:
        run(session, untimed, jobs=2 if session.toy else 3)
        run(session, [one for one in left if one not in untimed], jobs=2 if session.toy else 1)
    finally:
        session.report()


def select_rows(every: list[Measurement], only: str | None) -> list[Measurement]:
    """The rows that ``--only`` selects by name or by prefix.

    Raises:
      InputError: a name that matches no row.
    """
    if only is None:
        return every
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if not name or not any(_named(one, name) for one in every):
            raise InputError(f"--only: no row has the name or prefix {name!r}: see --list")
    return [one for one in every if any(_named(one, name) for name in names)]


def _named(one: Measurement, name: str) -> bool:
    return one.name == name or one.name.startswith(name.rstrip(".") + ".")


def parse_failures(every: list[Measurement], given: list[str]) -> dict[str, str]:
    """``{row: failure}`` of ``--spoil``.

    Raises:
      InputError: an unknown row or failure.
    """
    pairs = dict(text.partition("=")[::2] for text in given)
    for name, how in pairs.items():
        if name not in {one.name for one in every} or how not in FAILURES:
            raise InputError(f"--spoil takes NAME=HOW with HOW one of {', '.join(FAILURES)}, not {name}={how}")
    return pairs


def command(given: argparse.Namespace) -> str:
    """The command that repeats one row, with ``{name}`` in place of its name."""
    words = ["python", "experiments/bench.py", "gpu", "--output", "DIR", *(["--rehearse"] if given.rehearse else [])]
    return shlex.join(words) + " --only {name}"


def summary_line(wanted: list[Measurement], found: dict[str, Any], output: Path) -> str:
    """The counts by status and the path of the report, in one line; rows that failed a check go to stderr."""
    counts: dict[str, int] = {}
    for one in wanted:
        kind = found[one.name]["status"] if one.name in found else "not measured yet"
        counts[kind] = counts.get(kind, 0) + 1
    wrong = [name for name, row in found.items() if row["status"] == "done" and row["measured"].get("ok") is False]
    if wrong:
        print(f"WRONG: {', '.join(wrong)}", file=sys.stderr)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) + f": {output / 'report.md'}"
