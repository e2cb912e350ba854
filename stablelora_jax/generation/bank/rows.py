"""The rows of one batch through the adapters of a bank, with ``jax.vmap`` over the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.generation.bank.held import Bank
from stablelora_jax.lora.apply import adapted
from stablelora_jax.models.cache import Cache
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError

CACHE_ROWS = Cache(1, 1, 0, None)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Banked:
    """A Linen model whose rows run through the adapters of a bank; made by :func:`banked`."""

    model: nn.Module

    @checked
    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """``model.apply`` with an adapter for each row.

        Args:
          variables: ``"params"`` of the base; ``"bank"``; and ``"rows"``, (B,) int: the number of each row's adapter,
            -1 for the base model.
          *args: arrays, or trees of them, with the rows on their first axis; passed on to the model.
          **kwargs: likewise; a decoder's ``cache`` keeps its own row axes; values that are no arrays are shared.

        Returns:
          The model's output, rows on the first axis (in a cache, on its own).

        Raises:
          InputError: rows outside the bank, or not one for each row of the batch. While tracing, numbers are not known:
            there, a row outside the bank gives NaN.
        """
        for name in ("params", "bank", "rows"):
            if name not in variables:
                raise InputError(f'the variables lack "{name}": give params, bank and rows')
        if kwargs.get("rngs") is not None:
            raise InputError("a bank is for inference, without dropout: leave out rngs")
        bank = variables["bank"]
        if not isinstance(bank, Bank):
            raise InputError(f'"bank" must be what make_bank gives, not {type(bank).__name__}')
        rows = _checked(variables["rows"], bank.size, args)
        own = {name: value for name, value in variables.items() if name not in ("bank", "rows")}
        gathered = jax.tree.map(lambda x: jnp.take(x, rows, 0, mode="fill"), (bank.adapters, bank.numbers))
        shared = {name: value for name, value in kwargs.items() if not _has_rows(value)}
        given = (args, {name: value for name, value in kwargs.items() if name not in shared})
        model, axes = adapted(self.model, bank.spec), jax.tree.map(_axis, given, is_leaf=_is_cache)
        cached = any(_is_cache(value) for value in jax.tree.leaves(given, is_leaf=_is_cache))
        out_axes: Any = (0, CACHE_ROWS) if cached else 0

        def one(lora: Any, given: Any) -> Any:
            args, own_kwargs = _with(jnp.expand_dims, given, axes)
            whole = {**own, "lora": lora[0], "lora_hp": lora[1]}
            return _with(jnp.squeeze, model.apply(whole, *args, **own_kwargs, **shared), out_axes)

        return jax.vmap(one, (0, axes), out_axes)(gathered, given)


@checked
def banked(model: nn.Module) -> Banked:
    """``model`` with the adapters of a bank: an object with the ``apply`` of a Linen module."""
    return Banked(model)


def _checked(rows: Any, size: int, args: Any) -> jax.Array:
    """Indices into the bank's arrays: the last for -1, one beyond it for numbers outside the bank."""
    try:
        rows = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    except ValueError:  # lists of different lengths
        rows = np.array(None)
    shape, dtype = rows.shape, rows.dtype
    batch = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(args, is_leaf=_is_cache) if not _is_cache(leaf)}
    if not jnp.issubdtype(dtype, jnp.integer) or len(shape) != 1 or batch - {shape}:
        raise InputError(f"rows must be whole numbers, one for each row of the batch, not {dtype.name} {shape}")
    if not isinstance(rows, jax.core.Tracer) and shape[0]:
        wrong = [int(row) for row in np.asarray(rows) if not -1 <= row < size]
        if wrong:
            raise InputError(f"row {wrong[0]} is outside the bank of {size} adapters: 0 to {size - 1}, -1 for the base")
    rows = jnp.asarray(rows)
    return jnp.where(rows == -1, size, jnp.where((rows < 0) | (rows >= size), size + 1, rows))


def _has_rows(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return _is_cache(value) or bool(leaves) and all(getattr(leaf, "shape", ()) for leaf in leaves)


def _is_cache(value: Any) -> bool:
    return isinstance(value, Cache)


def _axis(value: Any) -> Any:
    return CACHE_ROWS if _is_cache(value) else 0


def _with(change: Any, value: Any, axes: Any) -> Any:
    """``change(leaf, axis)`` for every leaf with an axis of rows; ``axes`` may be a prefix of ``value``."""
    spread = jax.tree.map(
        lambda axis, below: jax.tree.map(lambda _: axis, below), axes, value, is_leaf=lambda axis: axis is None
    )
    return jax.tree.map(
        lambda axis, leaf: leaf if axis is None else change(leaf, axis), spread, value, is_leaf=lambda x: x is None
    )
