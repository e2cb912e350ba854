"""Write a trained adapter for another program: ``python experiments/export.py RUN --to peft|vllm|gguf|merged``."""

from __future__ import annotations

import argparse
import sys

from stablelora_jax.interop.export import KINDS, export
from stablelora_jax.runs.cli import exit_code


def main() -> int:
    """Parse the command line, export, and turn unusable input into one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Write a trained adapter for another program.")
    parser.add_argument("run", metavar="RUN", help="run directory of experiments/train.py, or a PEFT adapter")
    parser.add_argument("--to", required=True, choices=KINDS, help="merged: a whole model; gguf: for llama.cpp")
    parser.add_argument("--output", metavar="PATH", help="where to; RUN/export/KIND unless given; must not exist")
    parser.add_argument("--base", metavar="MODEL", help="the base, if RUN does not name it: directory, .gguf, hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a merged model; the run's unless given")
    parser.add_argument("--untie", action="store_true", help="for an adapter that changes one of a tied pair alone")
    parser.add_argument("--strict", action="store_true", help="refuse a base that the adapter was not made on")
    given = parser.parse_args()
    where = {"output": given.output, "base": given.base, "dtype": given.dtype, "untie": given.untie}
    where["strict"] = given.strict
    return exit_code(lambda: export(given.run, given.to, **where))


if __name__ == "__main__":
    sys.exit(main())
