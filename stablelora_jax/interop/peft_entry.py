"""One tensor of a PEFT adapter and where it is in the adapter tree."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stablelora_jax.utils.tree import Path


class Entry(NamedTuple):
    """One tensor of a file and its part of a leaf in the adapter tree."""

    name: str  # without the prefix
    shape: tuple[int, ...]  # in the file
    path: Path  # of the leaf
    leaf_shape: tuple[int, ...]
    slices: tuple[int | slice, ...]  # into the leaf, its stack axes flattened to one
    transposed: bool

    def take(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor of the file, from ``leaf``."""
        part = self._flat(leaf)[self.slices]
        return np.ascontiguousarray(part.T if self.transposed else part)

    def put(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Write the tensor of a file into its part of ``leaf``, in place."""
        self._flat(leaf)[self.slices] = tensor.T if self.transposed else tensor

    def _flat(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(-1, *leaf.shape[len(leaf.shape) - len(self.shape) :])
