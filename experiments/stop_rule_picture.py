"""The README's picture, docs/images/stop-rule.png: the ratio of Stable-LoRA's stop rule falls to 1, AdamW's does not.

To draw it again (two minutes on a CPU)::

    python experiments/train.py optimizer.shrink_ratio=5e-3 output=runs/stable
    python experiments/train.py 'optimizer={name: adamw, learning_rate: 5e-3}' output=runs/adamw
    python experiments/stop_rule_picture.py runs/stable runs/adamw --output docs/images/stop-rule.png

5e-3 is the largest shrink ratio that the paper searches: all pairs reach 1 within these 400 steps.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stablelora_jax.runs import panels
from stablelora_jax.runs.cli import exit_code
from stablelora_jax.runs.curves import Curves, ratios_of, read_curves
from stablelora_jax.runs.files import SOFTWARE, is_picture
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import write_bytes_whole, writing


def main() -> int:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stable", type=Path, help="run directory of Stable-LoRA")
    parser.add_argument("adamw", type=Path, help="run directory of AdamW")
    parser.add_argument("--output", type=Path, required=True, help="the PNG; a picture of runs is replaced")
    given = parser.parse_args()
    return exit_code(lambda: draw(given.stable, given.adamw, given.output))


def draw(stable: Path, adamw: Path, output: Path) -> None:
    """Three panels: the ratios of Stable-LoRA's pairs, those of AdamW's, and the mean norms of both runs.

    Raises:
      InputError: a run without recorded ratios, or another file at ``output``.
    """
    runs = [read_curves(stable), read_curves(adamw)]
    for path, curves in zip((stable, adamw), runs, strict=True):
        if not len(ratios_of(curves).steps):
            raise InputError(f"{path} has recorded no ratios")
    if not is_picture(output):
        raise InputError(f"{output} was not drawn from a run: move it, or choose another --output")
    figure = Figure(figsize=(11, 3.7), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    middle.sharey(left)
    _ratios(left, runs[0], "Stable-LoRA: A shrinks until the ratio is 1")
    _ratios(middle, runs[1], "AdamW: the ratios stay apart")
    left.set_ylabel("(‖A‖ / in) / (‖B‖ / out)")
    middle.tick_params(labelleft=False)
    _norms(right, *runs)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_whole(output, to_png(figure))


def to_png(figure: Figure) -> bytes:
    """The picture with 64 colours, a third of the size that it has with all."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=140)
    named = PngInfo()
    named.add_text("Software", SOFTWARE)
    Image.open(full).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
        small, format="PNG", optimize=True, pnginfo=named
    )
    return small.getvalue()


def _ratios(axes: Any, curves: Curves, title: str) -> None:
    found = ratios_of(curves)
    axes.plot(found.steps, found.values, color=panels.BLUE, alpha=0.55, linewidth=1)
    axes.axhline(1, color=panels.GRAY, linestyle="--", linewidth=1.2)
    if curves.stops:
        steps = [step for step, _ in curves.stops]
        axes.plot(steps, [1] * len(steps), "o", color=panels.VERMILLION, markersize=6, alpha=0.85)
        axes.annotate(
            f"here a pair stops shrinking\n({len(steps)} of {len(found.names)} pairs)",
            (max(steps), 1),
            (0.97, 0.5),
            textcoords="axes fraction",
            ha="right",
            color=panels.VERMILLION,
            arrowprops={"arrowstyle": "->", "color": panels.VERMILLION},
        )
    axes.set(yscale="log", ylim=(0.55, 12))
    axes.set_title(title, fontsize=11.5)
    panels.plain_log_ticks(axes)


def _norms(axes: Any, stable: Curves, adamw: Curves) -> None:
    for letter, color in (("a", panels.ORANGE), ("b", panels.BLUE)):
        for name, curves, style in (("Stable-LoRA", stable, "-"), ("AdamW", adamw, "--")):
            values = curves.series[f"norm_{letter}"]
            axes.plot(curves.steps, values, style, color=color, label=f"‖{letter.upper()}‖, {name}")
    axes.set_ylim(0, None)
    axes.set_title("Mean norm over the pairs", fontsize=11.5)
    axes.legend(loc="lower right", frameon=False, fontsize=10)


if __name__ == "__main__":
    sys.exit(main())
