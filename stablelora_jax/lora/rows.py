"""An adapter of its own for each row of a batch: the base's products run once over all rows (Punica, arXiv 2310.18547).

``adapted(model, spec).apply({"params": params, "lora": adapters, "lora_hp": numbers, "lora_rows": rows}, x)`` takes N
adapters, stacked on a first axis: (N, stack..., in, r) and so on, of the shapes of one ``spec``, whose scale is not
used where ``numbers`` (N, stack...) are given. ``rows`` (B,) holds the number of each row's adapter. Adapters of a
smaller rank are padded with zeros, and one that leaves a module out has zeros there.

Inside a module, each row gathers its own pair, and ``x A`` and ``z B`` are batched products; the gradient of the gather
sums over an adapter's rows. The rows must be the first axis of what the module reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.utils.errors import InputError

BY_ROW = ("lora_rows", "lora_key")  # leaves with the rows of the batch as their axis


def one_of(adapters: Any) -> Any:
    """The shapes of one of N stacked adapters.

    Raises:
      InputError: leaves whose first axes differ.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(adapters)}
    if len(sizes) != 1 or () in sizes:
        raise InputError(
            f"with lora_rows, the first axis of all leaves counts the adapters; here it is {sorted(sizes)}"
        )
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), adapters)


def by_number(leaves: Mapping[str, Any], rows: Any, stack: tuple[int, ...]) -> dict[str, jax.Array]:
    """The leaves of a module, (N, stack..., ...), as a scan slices them: (stack..., N, ...), with ``rows`` beside them.

    Raises:
      InputError: ``rows`` are not (B,) whole numbers.
    """
    rows = jnp.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise InputError(f"lora_rows must be whole numbers, one for each row, not {rows.dtype} {rows.shape}")
    count = jnp.shape(leaves["lora_a"])[0]
    moved = {}
    for name, leaf in leaves.items():
        one = jnp.asarray(leaf)
        same = one.shape[: len(stack)] == stack and one.ndim == len(stack)  # a number that all adapters share
        moved[name] = jnp.broadcast_to(one[..., None], (*stack, count)) if same else jnp.moveaxis(one, 0, len(stack))
    return {**moved, "lora_rows": jnp.broadcast_to(rows, (*stack, *rows.shape))}


def numbered(own: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Of a module's own leaves those of its adapters, whose first axis is their number."""
    return {name: leaf for name, leaf in own.items() if name.startswith("lora_") and name not in BY_ROW}


def each_row(changed: Callable[..., jax.Array], own: Mapping[str, Any], y: Any, x: Any, gain: Any) -> jax.Array:
    """``changed(y, x, adapter, gain)`` of each row, which is a batch of one there, with the row's adapter.

    Raises:
      InputError: the first axis of ``x`` is not that of the rows.
    """
    rows = own["lora_rows"]
    if jnp.shape(x)[:1] != rows.shape:
        raise InputError(f"{rows.shape[0]} lora_rows for an input of {jnp.shape(x)}: rows must be its first axis")
    adapter, gain = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), (numbered(own), gain))

    def one(y: jax.Array, x: jax.Array, adapter: Any, gain: Any) -> jax.Array:
        return changed(y[None], x[None], adapter, gain)[0]

    found: jax.Array = jax.vmap(one)(y, x, adapter, gain)
    return found
