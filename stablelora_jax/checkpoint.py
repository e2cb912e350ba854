"""Orbax checkpoints of a training state: adapters, optimizer state with its latches, step and key; never the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from stablelora_jax.errors import InputError


def open_manager(directory: str | Path, *, keep: int = 2) -> Any:
    """An Orbax ``CheckpointManager`` over ``directory`` that keeps the last ``keep`` steps; saves are asynchronous."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def save(manager: Any, step: int, state: Any) -> None:
    """Begin to save ``state``, a tree of host arrays, as ``step``; a step already saved is left alone."""
    import orbax.checkpoint as ocp

    if step not in manager.all_steps():
        manager.save(step, args=ocp.args.StandardSave(state))


def restore(manager: Any, state: Any) -> Any:
    """The newest complete checkpoint, in the structure, shapes and dtypes of ``state`` (arrays or abstract).

    Raises:
      InputError: there is none, or it cannot be read into that structure.
    """
    import orbax.checkpoint as ocp

    step = manager.latest_step()
    if step is None:
        raise InputError(f"{manager.directory} holds no complete checkpoint")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged or foreign checkpoints
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint {step} in {manager.directory} cannot be read: {reason}") from None
