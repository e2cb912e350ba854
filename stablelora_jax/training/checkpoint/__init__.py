"""Checkpoints of a training state, written by Orbax while training goes on. They work in any loop, without our trainer.

Each step is a directory that Orbax puts in place by renaming it once it is whole::

    DIR/40/state    the tree of arrays (an Orbax ``StandardSave`` item, which Orbax alone can read, too)
    DIR/40/about    JSON: what the caller says about the run, and of every leaf its shape, dtype and CRC-32

A directory that does not hold this ``metadata`` is none of ours: it is not counted, and never removed.

``where`` is a manager from :func:`open_manager`, or a directory: then the call opens it, acts, waits, and closes it.
Of several processes all must make each call. Leaves that a process holds whole (NumPy arrays, arrays on its own
devices, replicated ones) are written once, by process 0 (Orbax's ``NumpyHandler`` writes nothing elsewhere), and have a
checksum; of an array that is sharded over processes each writes its shards, without one.
"""

from stablelora_jax.training.checkpoint.reading import latest, read_metadata, require_undamaged, restore, steps
from stablelora_jax.training.checkpoint.writing import open_manager, save, wait

__all__ = ["latest", "open_manager", "read_metadata", "require_undamaged", "restore", "save", "steps", "wait"]
