"""What an adapter is: the pair, and the target modules of a model that a spec selects.

``y = x W0 + s (x A) B`` for a Flax kernel ``W0`` (in, out), with A = ``lora_a`` (in, r), B = ``lora_b`` (r, out) and
``s = alpha / r`` (LoRA, arXiv 2106.09685) or ``alpha / sqrt(r)`` (rsLoRA, arXiv 2312.03732). ::

    params   = {"model": {"layers": {"self_attn": {"q_proj": {"kernel": (L, in, out)}}}}}
    adapters = {"model": {"layers": {"self_attn": {"q_proj": {"lora_a": (L, in, r), "lora_b": (L, r, out)}}}}}

A *pair* is any dict that holds both ``lora_a`` and ``lora_b``; the last two axes are the matrix, leading axes index
independent pairs. Where layers differ in rank or are not adapted, the stack is padded to the largest rank with zeros
in *both* factors, which every gradient then keeps at zero.

A dict may hold more that is trained: what the parametrisation adds (DoRA: ``lora_magnitude_vector`` (..., out)), and
under ``lora_full`` the parameters that :mod:`stablelora_jax.lora.full_parameters` replaces in the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from stablelora_jax.lora.names import module_names, unindexed
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

FULL = "lora_full"  # the key, beside a pair's, of what is trained in full


class TargetModule(NamedTuple):
    """One module that carries adapters, or a stack of them."""

    path: Path
    names: tuple[str, ...]  # dotted module names, one for each element of the stack, C order
    stack: tuple[int, ...]  # shape of the stack axes; () for a single module
    ranks: tuple[int, ...]  # one for each name; 0 where the layer is not adapted
    scales: tuple[float, ...]  # likewise
    size: tuple[int, int]  # (in, out) with all contracted and all other kernel axes flattened
    leaf: str = "kernel"  # the parameter of the module that the pair changes; "": the one at ``path`` itself
    in_axes: tuple[int, ...] = (0,)  # that the kernel contracts, after the stack; adapters alone do not tell
    looked_up: bool = False  # an embedding (vocabulary, features), read by indices
    stack_axes: tuple[int, ...] | None = None  # of the parameter; None: the leading ones
    in_sizes: tuple[int, ...] = ()  # of ``in_axes``; (): of one axis

    @property
    def leaf_path(self) -> Path:
        """The path of the parameter."""
        return (*self.path, self.leaf) if self.leaf else self.path

    @property
    def rank(self) -> int:
        """The rank that the stack is padded to."""
        return max(self.ranks, default=0)

    @property
    def parameters(self) -> int:
        """Trained numbers of the pairs, padding not counted."""
        return sum(self.ranks) * sum(self.size)

    def mask(self) -> np.ndarray:
        """Which columns of A, and rows of B, are in use: bool, stack + (rank,)."""
        return (np.arange(self.rank) < np.array(self.ranks)[:, None]).reshape(*self.stack, self.rank)

    def scale(self) -> jnp.ndarray:
        """The scale of each element of the stack, in the default float dtype."""
        return jnp.asarray(np.array(self.scales).reshape(self.stack), jnp.result_type(float))


def is_pair(node: Any) -> bool:
    """Whether ``node`` is a dict that holds a LoRA pair."""
    return isinstance(node, Mapping) and "lora_a" in node and "lora_b" in node


def pairs(adapters: Any) -> dict[Path, Mapping[str, Any]]:
    """Every pair of ``adapters`` by path, sorted."""
    return tree.find_dicts(adapters, is_pair)


def make_target_module(
    path: Path,
    stack: tuple[int, ...],
    size: tuple[int, int],
    spec: LoraSpec,
    leaf: str = "kernel",
    in_axes: tuple[int, ...] = (0,),
    looked_up: bool | None = None,
) -> TargetModule:
    """The target module at ``path`` under ``spec``; its ranks are all 0 where nothing is selected.

    ``all-linear`` means kernels, as in PEFT: an embedding has to be named.
    """
    looked_up = leaf == "embedding" if looked_up is None else looked_up
    names = module_names(path, stack, spec.stacked)
    plain = [unindexed(name) for name in names]
    own = path[-1:] and path[-1] in spec.stacked and spec.selects(".".join(path))  # a leaf that is its own stack
    embeds = looked_up or (leaf or path[-1]).endswith("embedding")
    chosen = [(own or spec.selects(name)) and not (embeds and spec.target_modules == "all-linear") for name in plain]
    ranks = tuple(spec.rank_of(n) if c else 0 for n, c in zip(plain, chosen, strict=True))
    scales = tuple(spec.scale_of(n) if c else 0.0 for n, c in zip(plain, chosen, strict=True))
    return TargetModule(path, names, stack, ranks, scales, size, leaf, in_axes, looked_up)


def pair_shapes(adapters: Any) -> dict[Path, tuple[tuple[int, ...], int, tuple[int, int]]]:
    """``(stack axes, rank, (in, out))`` of every pair by path.

    Raises:
      InputError: there are no pairs, or two factors make none.
    """
    found = {}
    for path, pair in pairs(adapters).items():
        a, b = jnp.shape(pair["lora_a"]), jnp.shape(pair["lora_b"])
        if len(a) < 2 or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2]:
            raise InputError(f"{'.'.join(path)}: lora_a {a} and lora_b {b} do not make a pair (in, r) and (r, out)")
        if 0 in (*a, *b):
            raise InputError(f"{'.'.join(path)}: lora_a {a} and lora_b {b} hold nothing: make them with init_adapters")
        found[path] = (a[:-2], a[-1], (a[-2], b[-1]))
    if not found:
        raise InputError("the adapter tree holds no pair (no dict with both lora_a and lora_b)")
    return found


def require_rank(target: TargetModule, rank: int) -> None:
    """Check that adapters at ``target`` have the rank of the spec.

    Raises:
      InputError: they have another.
    """
    if target.rank != rank:
        raise InputError(f"{'.'.join(target.path)}: adapters have rank {rank}, the spec says {target.rank}")
