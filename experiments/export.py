"""Export a trained adapter: ``python experiments/export.py RUN --to peft|vllm|gguf|merged``."""

import sys
from functools import partial

from stablelora_jax.cli.main import script

main = partial(script, "export")

if __name__ == "__main__":
    sys.exit(main())
