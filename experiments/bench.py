"""Benchmarks: ``python experiments/bench.py train|curves|optimizers|gpu ...``; see ``experiments/bench/``."""

import sys

from bench.front import main

if __name__ == "__main__":
    sys.exit(main())
