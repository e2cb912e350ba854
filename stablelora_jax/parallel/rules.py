"""How the base and its activations are split over a mesh ``(data, fsdp, tensor)``, by the names of modules.

=========================== ===================== ========================= =======================
leaf                        of modules            split                     its output (B, T, ...)
=========================== ===================== ========================= =======================
kernel (..., in, out)       q, k, v, gate, up,    in: fsdp, out: tensor     (data+fsdp, -, tensor)
                            lm_head
kernel (..., in, out)       o_proj, down_proj     in: tensor, out: fsdp     (data+fsdp, -, -)
embedding (V, D)            embed_tokens          V: tensor, D: fsdp        (data+fsdp, -, -)
everything else             norms, biases         replicated                (data+fsdp, -, -)
=========================== ===================== ========================= =======================

Embedding and head are gathered along fsdp once a step, before the look-up and the loop over tiles of logits. An axis
that does not divide stays whole, and so do the four projections of attention, over ``tensor``, unless whole groups of
heads fit (it divides ``num_key_value_heads``). Rows go over data and fsdp. With the outputs fixed, the only way to
multiply is to gather one layer's kernels along fsdp just before use, forwards and backwards (ZeRO-3, arXiv 1910.02054),
and to sum twice a layer over tensor, each way (Megatron, arXiv 1909.08053); a test counts this in the compiled program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import keys_of

ROWS = ("data", "fsdp")
INWARD = ("o_proj", "down_proj")  # their input is what tensor splits
OUTWARD = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def base_spec(
    path: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int], *, split_heads: bool
) -> PartitionSpec:
    """The split of the parameter ``path``; ``sizes`` are those of the mesh's axes.

    Raises:
      InputError: the array is part of a quantised kernel, and there is an axis to split it over.
    """
    if "kernel" in path[:-1] and (sizes["fsdp"] > 1 or sizes["tensor"] > 1):
        name = ".".join(path[: path.index("kernel")])
        raise InputError(f"{name} is quantised, which only data can spread: set fsdp and tensor to 1, or quantize none")
    module, leaf = path[-2] if len(path) > 1 else "", path[-1]
    if leaf not in ("kernel", "embedding") or len(shape) < 2:
        return PartitionSpec()
    axes: list[str | None] = ["tensor", "fsdp"] if leaf == "embedding" or module in INWARD else ["fsdp", "tensor"]
    if module in ATTENTION and not split_heads:
        axes[axes.index("tensor")] = None
    kept = [axis if axis and size % sizes[axis] == 0 else None for axis, size in zip(axes, shape[-2:], strict=True)]
    return PartitionSpec(*(None,) * (len(shape) - 2), *kept)


def gathered_ends(params: Any, mesh: Mesh) -> Any:
    """``params`` with embeddings and head whole along fsdp.

    No look-up can be split well by features and by rows at once, and a loop over logits would gather in each turn.
    """

    def gather(path: Any, x: jax.Array) -> jax.Array:
        keys = keys_of(path)
        if keys[-1] != "embedding" and keys[-2:] != ("lm_head", "kernel"):
            return x
        axis = 0 if keys[-1] == "embedding" else 1  # the vocabulary's
        split = "tensor" if x.shape[axis] % mesh.shape["tensor"] == 0 else None
        spec = PartitionSpec(split, None) if axis == 0 else PartitionSpec(None, split)
        split_x: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return split_x

    return jax.tree_util.tree_map_with_path(gather, params)


def constrained(mesh: Mesh, *, split_heads: bool) -> Any:
    """An interceptor for ``flax.linen.intercept_methods`` that fixes the split of each module's output."""

    def split(y: jax.Array, last: str | None) -> jax.Array:
        last = last if last and y.shape[-1] % mesh.shape[last] == 0 else None
        spec = PartitionSpec(ROWS, *(None,) * (y.ndim - 2), last)
        split_y: jax.Array = jax.lax.with_sharding_constraint(y, NamedSharding(mesh, spec))
        return split_y

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y, name, method = next_fun(*args, **kwargs), context.module.name, context.method_name
        if not isinstance(y, jax.Array) or y.ndim < 3 or name is None or method not in ("__call__", "attend"):
            return y  # the whole model has no name
        outward = method == "attend" or (name in OUTWARD and (split_heads or name not in ATTENTION))
        return split(y, "tensor" if outward else None)

    return intercept
