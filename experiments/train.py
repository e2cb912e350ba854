"""Fine-tune a language model: ``python experiments/train.py [--config X.yaml] [key.sub=value ...]``."""

import sys
from functools import partial

from stablelora_jax.cli.main import script

main = partial(script, "train")

if __name__ == "__main__":
    sys.exit(main())
