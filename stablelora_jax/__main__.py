"""``python -m stablelora_jax``: the command ``stablelora``."""

import sys

from stablelora_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m stablelora_jax"))
