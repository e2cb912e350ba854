"""Export a trained adapter: ``python experiments/export.py RUN --to peft|vllm|gguf|merged``."""

from __future__ import annotations

import argparse
import sys

from stablelora_jax.interop.export import KINDS, export
from stablelora_jax.runs.cli import exit_code


def main() -> int:
    """Parse the command line and export; returns the exit code, after a one-line error message if it is not 0."""
    parser = argparse.ArgumentParser(description="Export a trained adapter in the format of another program.")
    parser.add_argument("run", metavar="RUN", help="run directory of experiments/train.py, or a PEFT adapter")
    parser.add_argument("--to", required=True, choices=KINDS, help="merged: a full model; gguf: for llama.cpp")
    parser.add_argument("--output", metavar="PATH", help="output path (default: RUN/export/KIND); must not exist")
    parser.add_argument("--base", metavar="MODEL", help="base model, if RUN does not name it: directory, .gguf, hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of a merged model (default: the run's)")
    parser.add_argument(
        "--untie", action="store_true", help="untie the head, for an adapter of only one of a tied pair"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a base other than the one the adapter was made on"
    )
    given = parser.parse_args()
    options = {"output": given.output, "base": given.base, "dtype": given.dtype, "untie": given.untie}
    options["strict"] = given.strict
    return exit_code(lambda: export(given.run, given.to, **options))


if __name__ == "__main__":
    sys.exit(main())
