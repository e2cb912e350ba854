"""Runs that an older version began: their checkpoints under the names of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from stablelora_jax import config
from stablelora_jax.config.run import RunConfig
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import TrainState


class OldTrainState(NamedTuple):
    """:class:`TrainState` under the names by which checkpoints up to November 2026 know its leaves."""

    step: Any
    skipped: Any
    in_a_row: Any  # consecutive_skips
    adapters: Any
    opt_state: Any
    key: Any


def restore(
    checkpoints: Path, like: TrainState, step: int, metadata: dict[str, Any], *, accept_changes: bool = False
) -> TrainState:
    """``checkpoint.restore`` of a run's state, whichever version has saved it.

    Args:
      checkpoints: the run's directory of checkpoints.
      like: a state of the structure, shapes and dtypes that are expected.
      step: which checkpoint.
      metadata: what it must agree with, ``{"run": ..., "base": ..., "data": ...}``.
      accept_changes: go on although it does not agree.

    Raises:
      InputError: as ``checkpoint.restore``.
    """
    saved = checkpoint.read_metadata(checkpoints, step).get("run")
    renamed = config.with_new_names(RunConfig, saved)
    if renamed == saved:
        return checkpoint.restore(checkpoints, like, step=step, metadata=metadata, accept_changes=accept_changes)
    metadata = {**metadata, "run": saved} if renamed == metadata["run"] else metadata
    old = OldTrainState(*like)
    return TrainState(*checkpoint.restore(checkpoints, old, step=step, metadata=metadata, accept_changes=accept_changes))
