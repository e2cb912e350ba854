"""The base of all formats: a leaf of the parameter tree that stands for a kernel, and is a pytree of smaller arrays.

All arrays of a leaf have the kernel's leading axes, so a scan over layers slices them as it slices the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeGuard

import jax
import numpy as np


@dataclass(frozen=True)
class Quantized:
    """Stands for a frozen kernel ``(*stack, in, out)`` of ``dtype``; a format adds its arrays and ``stack``."""

    size: tuple[int, int] = field(metadata={"static": True})  # (in, out)
    dtype: np.dtype = field(metadata={"static": True})  # of the kernel

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return (*self.stack, *self.size)

    @property
    def ndim(self) -> int:
        """Number of the kernel's axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def is_quantized(leaf: object) -> TypeGuard[Quantized]:
    """Whether ``leaf`` stands for a kernel."""
    return isinstance(leaf, Quantized)
