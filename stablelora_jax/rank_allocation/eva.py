"""EVA's ranks: a budget goes to the principal axes that explain most of the inputs (Paischer et al., arXiv 2410.07170).

::

    found = calibrate(adapted(model, spec), params, batches, loss)         # spec.init == "eva"
    shares = explained_variance(found, spec)
    ranks = redistributed(shares, {name: spec.rank_of(name) for name in shares})
    spec = with_ranks(spec, ranks)
    adapters = init_adapters(key, params, spec, calibration=found)

The axes of one module are compared with those of all others by their shares of the variance of the module's own inputs.
As in PEFT (``EvaConfig``), a module competes with its first ``rho r`` axes, may end with none, and keeps its alpha / r.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from stablelora_jax.lora.names import unindexed
from stablelora_jax.lora.pairs import make_target_module
from stablelora_jax.lora.spec import LoraSpec, items
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError


def explained_variance(calibration: Mapping[str, Any], spec: LoraSpec) -> dict[str, np.ndarray]:
    """The share of each principal axis in the variance of its module's inputs, by the module's name, the largest first.

    Args:
      calibration: of :func:`stablelora_jax.calibrate` for a spec with ``init="eva"``.
      spec: of the adapters; modules and layers that it does not select are left out.

    Raises:
      InputError: the calibration holds no inputs.
    """
    nodes = tree.find_dicts(calibration, lambda node: "inputs" in node and "variance" in node)
    if not nodes:
        raise InputError("the calibration holds no inputs: make it with calibrate for a spec with init='eva'")
    found = {}
    for path, node in nodes.items():
        axes, variance = np.asarray(node["inputs"]), np.asarray(node["variance"])
        target = make_target_module(path, variance.shape, (axes.shape[-2], axes.shape[-1]), spec)
        squares = np.square(axes).sum(axis=-2)[..., : min(target.size)]
        shares = squares / np.maximum(variance, np.finfo(variance.dtype).tiny)[..., None]
        for name, rank, row in zip(target.names, target.ranks, shares.reshape(len(target.names), -1), strict=True):
            if rank:
                found[name] = row
    return found


def redistributed(shares: Mapping[str, np.ndarray], ranks: Mapping[str, int], rho: float = 2.0) -> dict[str, int]:
    """The ranks of all modules, as many together as before, each the number of its axes among the largest shares.

    Args:
      shares: of the axes of each module, the largest first, as :func:`explained_variance` gives them.
      ranks: of each module before; their sum is the budget.
      rho: a module may have up to ``round(rho r)`` axes; 1 changes nothing.

    Raises:
      InputError: rho is below 1, or the modules have fewer axes than the budget.

    Example::

        >>> redistributed({"q": np.array([0.9, 0.05]), "v": np.array([0.4, 0.3])}, {"q": 1, "v": 1}, rho=2.0)
        {'q': 1, 'v': 1}
        >>> redistributed({"q": np.array([0.2, 0.1]), "v": np.array([0.4, 0.3])}, {"q": 1, "v": 1}, rho=2.0)
        {'q': 0, 'v': 2}
    """
    if not rho >= 1:
        raise InputError(f"rho must be at least 1, not {rho!r}")
    budget = sum(ranks.values())
    axes = [
        (-share, i, name) for name, own in shares.items() for i, share in enumerate(own[: round(rho * ranks[name])])
    ]
    if len(axes) < budget:
        raise InputError(f"the modules have {len(axes)} axes, fewer than the {budget} of their ranks: lower the rank")
    chosen = [name for _, _, name in sorted(axes)[:budget]]
    return {name: chosen.count(name) for name in shares}


def with_ranks(spec: LoraSpec, ranks: Mapping[str, int]) -> LoraSpec:
    """``spec`` with these ranks, by ``rank_pattern``, and with alphas that keep each module's ``alpha / r``.

    A module of rank 0 is left out, by ``exclude_modules``.

    Raises:
      InputError: modules that patterns cannot tell apart have different ranks, or none is left.
    """
    plain: dict[str, int] = {}
    for name, rank in ranks.items():
        if plain.setdefault(unindexed(name), rank) != rank:
            raise InputError(f"no pattern tells {name} from its neighbours, whose rank is another")
    kept = {name: rank for name, rank in plain.items() if rank}
    if not kept:
        raise InputError("all ranks are 0, so that nothing would be trained")
    alphas = {name: spec.alpha_of(name) * rank / spec.rank_of(name) for name, rank in kept.items()}
    exact = {name: f"^{re.escape(name)}" for name in kept}
    return replace(
        spec,
        rank_pattern={**{exact[name]: rank for name, rank in kept.items()}, **dict(items(spec.rank_pattern))},
        alpha_pattern={**{exact[name]: alpha for name, alpha in alphas.items()}, **dict(items(spec.alpha_pattern))},
        exclude_modules=_excluded(spec, [name for name, rank in plain.items() if not rank]),
    )


def _excluded(spec: LoraSpec, names: list[str]) -> str | tuple[str, ...]:
    if not isinstance(spec.exclude_modules, str):
        return (*spec.exclude_modules, *names)
    return "|".join([f"(?:{spec.exclude_modules})", *map(re.escape, names)])
