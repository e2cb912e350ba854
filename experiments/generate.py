"""Continue prompts with a language model: ``python experiments/generate.py MODEL [--adapter DIR] [--prompt TEXT]``."""

import sys
from functools import partial

from stablelora_jax.cli.main import script

main = partial(script, "generate")

if __name__ == "__main__":
    sys.exit(main())
