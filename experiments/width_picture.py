"""The picture of docs/studies.md, docs/images/width-scaling.png: delta1 grows with the width, Stable-LoRA ends that.

To draw it again from the numbers that are kept::

    python experiments/width_picture.py experiments/results/width-scaling.json --output docs/images/width-scaling.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from stop_rule_picture import to_png

from stablelora_jax.runs.cli import exit_code
from stablelora_jax.runs.files import is_picture
from stablelora_jax.studies import width_panels
from stablelora_jax.studies.width_charts import LIMITS
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import read_json_object, write_bytes_whole, writing


def main() -> int:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of 'stablelora width-scaling'")
    parser.add_argument("--output", type=Path, required=True, help="the PNG; a picture of this package is replaced")
    given = parser.parse_args()
    return exit_code(lambda: draw(given.results, given.output))


def draw(results: Path, output: Path) -> None:
    """Three panels: the terms of early steps against the width, and delta1 / delta2 over the steps in two runs.

    Raises:
      InputError: no results; another file at ``output``.
    """
    if not is_picture(output):
        raise InputError(f"{output} was not drawn by this package: move it, or choose another --output")
    found = read_json_object(results)
    adam, shrunk = ([run for run in found["runs"] if run["config"] == f"R3 {name}"] for name in ("Adam", "Stable-LoRA"))
    figure = Figure(figsize=(11, 3.7), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    width_panels.deltas(left, adam, "early")
    width_panels.ratios(middle, adam, found["steps"], LIMITS)
    width_panels.ratios(right, shrunk, found["steps"], LIMITS)
    right.set_ylabel("")
    titles = ("Adam, first steps: delta1 grows as n", "Adam: the widths stay apart", "Stable-LoRA: they come together")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title, fontsize=11.5)
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_whole(output, to_png(figure))


if __name__ == "__main__":
    sys.exit(main())
