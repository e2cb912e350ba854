"""The progress of training: a bar on a terminal, else lines, with the loss and the speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.utils import progress


def open_progress(step: int, steps: int, *, hidden: bool = False) -> Any:
    """The progress at ``step`` of ``steps``, see :func:`stablelora_jax.utils.progress.open_progress`."""
    return progress.open_progress(steps, "train", "steps", initial=step, hidden=hidden)


def advance(progress: Any, record: Mapping[str, Any]) -> None:
    """One step on, with the loss and the speed of its record."""
    speed = f"{record['tokens_per_second']:.0f}"
    progress.set_postfix(loss=f"{record['loss']:.4f}", tokens_per_s=speed, refresh=False)
    progress.update()
