"""Evaluate a model on tasks: ``python experiments/evaluate.py MODEL [--adapter DIR] --tasks arc_easy,gsm8k``."""

import sys
from functools import partial

from stablelora_jax.cli.main import script

main = partial(script, "evaluate")

if __name__ == "__main__":
    sys.exit(main())
