"""``to_lora``: adapters of any parametrisation and start as plain LoRA or DoRA, which every other program knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.lora.combine.lowrank import svd_of_product, truncated
from stablelora_jax.lora.dense import decomposed_changes, is_dense
from stablelora_jax.lora.fitting import fitting_targets
from stablelora_jax.lora.leaf_checks import require_leaves
from stablelora_jax.lora.leaves import adapter_target_modules, split_frozen, trains_pairs
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS, dora
from stablelora_jax.lora.plain import plain_adapters
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import as_dict
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError

MAGNITUDE = "lora_magnitude_vector"


@checked
def to_lora(
    adapters: Mapping[str, Any], spec: LoraSpec, rank: int | None = None, *, params: Any = None
) -> tuple[dict[str, Any], LoraSpec]:
    """``(adapters, spec)`` of plain LoRA, or DoRA, with the same function on the same base.

    A start that stays subtracted becomes a part of the pair: PiSSA of rank r is LoRA of rank 2 r. The change of a dense
    parametrisation becomes its singular vectors: as many as the kernel has, unless ``rank`` cuts them.

    Args:
      adapters: as made by ``init_adapters`` for ``spec``.
      spec: the spec of the adapters.
      rank: the largest rank of the result: greater ones are cut to their largest singular values, which is the best
        approximation of that rank (LoRA-Squeeze, arXiv 2602.10993, after training). None: as it is, exactly.
      params: of the base; only shapes are read, but for a dense parametrisation. Required where the adapters alone do
        not tell the sizes of the kernels.

    Raises:
      InputError: adapters that do not fit; sizes that are not known; a DoRA whose rank would be cut, since its
        magnitudes belong to the direction that it has.
    """
    adapters = as_dict(adapters)
    if params is None and not trains_pairs(spec):
        raise InputError(f"{spec.parametrization}: the sizes of the kernels are not in the adapters: pass params=")
    targets = (
        adapter_target_modules(adapters, spec) if params is None else fitting_targets(adapters, spec, as_dict(params))
    )
    require_leaves(targets, adapters, spec)
    if is_plain(adapters, spec) and (rank is None or all(target.rank <= rank for target in targets.values())):
        return adapters, spec
    plain = plain_adapters(adapters, targets, spec)
    if is_dense(spec):
        plain = decomposed_changes(plain, targets, spec, as_dict(params))
    plain = split_frozen(plain)[0]
    ranks: dict[str, int] = {}
    for path, target in targets.items():
        pair, own = _packed(tree.get_in(plain, path), target)
        if rank is not None and pair["lora_a"].shape[-1] > rank:
            if MAGNITUDE in pair:
                raise InputError(f"{'.'.join(path)} is DoRA of rank {max(own)}, which cannot be cut to {rank}")
            pair, own = best_pair(pair, rank), tuple(min(rank, one) for one in own)
        plain = tree.set_in(plain, path, pair)
        ranks |= dict(zip(target.names, own, strict=True))
    return plain, plain_spec(spec, list(targets.values()), ranks)


def lora_shapes(
    adapters: Mapping[str, Any], spec: LoraSpec, params: Mapping[str, Any] | None
) -> tuple[dict[str, Any], LoraSpec]:
    """What :func:`to_lora` gives, with shapes in the place of arrays; nothing is computed."""
    specs = []

    def made(adapters: Any) -> Any:
        plain, plain_spec = to_lora(adapters, spec, params=params)
        specs.append(plain_spec)
        return plain

    return jax.eval_shape(made, adapters), specs[0]


def is_plain(adapters: Any, spec: LoraSpec) -> bool:
    """Whether ``adapters`` are LoRA or DoRA as PEFT knows them."""
    known = spec.parametrization in ("lora", "dora") and spec.scaling in ("lora", "rslora", "rora")
    return known and not split_frozen(adapters)[1]


def _packed(pair: Mapping[str, Any], target: TargetModule) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The pair whose used ranks come first in each layer, and their number; a padded start leaves gaps between."""
    width = pair["lora_a"].shape[-1]
    blocks = width // target.rank if len(set(target.ranks) - {0}) > 1 else 0  # of target.rank columns, each padded
    if blocks > 1:
        order = [[block * target.rank + i for block in range(blocks) for i in range(r)] for r in target.ranks]
        order = [[*row, *(i for i in range(width) if i not in row)] for row in order]
        index = jnp.asarray(np.array(order).reshape(*target.stack, width))
        a = jnp.take_along_axis(pair["lora_a"], index[..., None, :], axis=-1)
        b = jnp.take_along_axis(pair["lora_b"], index[..., :, None], axis=-2)
        pair = {**pair, "lora_a": a, "lora_b": b}
    return dict(pair), tuple((blocks * r if blocks else width) if r else 0 for r in target.ranks)


def best_pair(pair: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The best pair of ``rank``, its singular values shared evenly between the factors, which lead with the largest."""

    def one(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, sv = truncated(*svd_of_product(a, b), rank, None)
        root = jnp.sqrt(jnp.linalg.norm(sv, axis=1))
        a, b = u * root[None], sv / jnp.where(root == 0, 1, root)[:, None]
        lacking = rank - a.shape[1]
        return jnp.pad(a, [(0, 0), (0, lacking)]), jnp.pad(b, [(0, lacking), (0, 0)])

    a, b = pair["lora_a"], pair["lora_b"]
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (a, b)]
    made = jax.lax.map(lambda pair: one(*pair), tuple(flat))
    cut_a, cut_b = (x.reshape(*a.shape[:-2], *x.shape[1:]) for x in made)
    return {**pair, "lora_a": cut_a, "lora_b": cut_b}


def plain_spec(spec: LoraSpec, targets: list[TargetModule], ranks: Mapping[str, int]) -> LoraSpec:
    """The spec with the rank and the scale of each module; the usual ones as ``rank`` and ``alpha``."""
    scales = {name: s for t in targets for name, s in zip(t.names, t.scales, strict=True)}
    found = {name: (rank, scales[name] * rank) for name, rank in ranks.items() if rank}
    (rank, alpha), _ = Counter(found.values()).most_common(1)[0]
    others = {name: own for name, own in found.items() if own != (rank, alpha)}
    rescaled = getattr(PARAMETRIZATIONS[spec.parametrization], "merge", None) is dora.merge
    return replace(
        spec,
        parametrization="dora" if rescaled else "lora",
        options={},
        init="kaiming",
        scaling="lora",
        rank=rank,
        alpha=alpha,
        rank_pattern={name: own[0] for name, own in others.items()},
        alpha_pattern={name: own[1] for name, own in others.items()},
    )
