"""The progress bar of training on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def open_progress(step: int, steps: int, *, hidden: bool = False) -> Any:
    """A ``tqdm`` bar at ``step`` of ``steps``; hidden also where stderr is no terminal."""
    from tqdm import tqdm

    hidden = hidden or not sys.stderr.isatty()
    return tqdm(total=steps, initial=step, desc="train", unit="step", disable=hidden)


def advance(progress: Any, record: Mapping[str, Any]) -> None:
    """One step on, with the loss and the speed of its record."""
    speed = f"{record['tokens_per_second']:.0f}"
    progress.set_postfix(loss=f"{record['loss']:.4f}", tokens_per_s=speed, refresh=False)
    progress.update()
