"""Fine-tune a language model: ``python experiments/train.py [--config X.yaml] [key.sub=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about PyTorch, which is not used

from stablelora_jax import InputError, config  # noqa: E402
from stablelora_jax.run_config import RunConfig  # noqa: E402


def main() -> int:
    """Parse the command line, run, and turn unusable input into one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a language model with Stable-LoRA. Without arguments: the small base model that ships "
        "with the package learns a generated task in a few minutes on a CPU.",
        epilog="keys, for the YAML file and as key.sub=value on the command line:\n\n" + config.help_text(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="file with any of the keys below; configs/default.yaml unless given",
        default=str(Path(__file__).parents[1] / "configs" / "default.yaml"),
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="compile the step from shapes, without weights and data, and print the memory and FLOPs that it needs",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys that replace those of the file")
    arguments = parser.parse_args()
    try:
        run_config = config.load(RunConfig, arguments.config, arguments.overrides)
        if arguments.dry_run:
            from stablelora_jax.dry_run import dry_run

            dry_run(run_config)
            return 0
        from stablelora_jax.run import run

        run(run_config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
