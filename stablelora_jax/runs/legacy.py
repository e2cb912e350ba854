"""Runs that an older version began: their checkpoints under the names of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax

from stablelora_jax import config
from stablelora_jax.config.run import RunConfig
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import TrainState

KEYS = {"lora_full": "full"}  # of what is trained in full; those checkpoints have the second


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
    old = OldTrainState(*_with_old_keys(tuple(like)))
    found = checkpoint.restore(checkpoints, old, step=step, metadata=metadata, accept_changes=accept_changes)
    return TrainState(*_with_new_keys(tuple(like), tuple(found)))


def _with_old_keys(tree: Any) -> Any:
    def node(own: Any) -> Any:
        return {KEYS.get(key, key): _with_old_keys(own[key]) for key in own} if isinstance(own, dict) else own

    return jax.tree.map(node, tree, is_leaf=lambda x: isinstance(x, dict))


def _with_new_keys(like: Any, tree: Any) -> Any:
    """The inverse of :func:`_with_old_keys` for a tree of the structure of ``like``."""

    def node(own: Any, old: Any) -> Any:
        return {k: _with_new_keys(own[k], old[KEYS.get(k, k)]) for k in own} if isinstance(own, dict) else old

    return jax.tree.map(node, like, tree, is_leaf=lambda x: isinstance(x, dict))
