"""Several adapters of one base as one: PEFT's ``add_weighted_adapter`` (``peft/tuners/lora/model.py``, 0.21).

With delta_i = s_i A_i B_i of adapter i at a module, w_i its weight, and ``mix`` a rule of ``prune.py``:

* ``cat``: ``A = [w_1 s_1 A_1, w_2 s_2 A_2, ...]``, ``B = [B_1; B_2; ...]``: exactly ``sum w_i delta_i``;
* ``linear``, ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``: both factors by themselves, ``A = mix(A_i,
  sign(w_i) sqrt|w_i s_i|)``, ``B = mix(B_i, sqrt|w_i s_i|)``. Products of unlike adapters appear too: a rough estimate;
* ``svd``: the best approximation of ``sum w_i delta_i`` in the new rank; exact where that suffices. ``ties_svd`` and
  so on: the same of ``mix(delta_i, w_i)``.

The new scale is 1. Departures from PEFT: where the first adapter is rsLoRA, PEFT keeps ``use_rslora`` and so scales the
same tensors by another sqrt(r); it reads ``exclude`` and ``layers`` of the first adapter alone; it accepts arguments
that it does not use.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.lora.combine.arguments import check
from stablelora_jax.lora.combine.lowrank import svd_of_product, truncated
from stablelora_jax.lora.combine.prune import RULES, Rule, keep_largest, keep_random, mix
from stablelora_jax.lora.combine.union import common_target_modules, union_spec
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec, items
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


class Part(NamedTuple):
    """What one adapter has at one target module; P is the number of its modules."""

    number: int  # of the adapter
    target: TargetModule
    a: jax.Array  # (P, in, r)
    b: jax.Array  # (P, r, out)
    weight: float


class Module(NamedTuple):
    """What N adapters have at one module; with one more axis in front, at all of a stack."""

    a: list[jax.Array]  # of (in, r), each padded to its own stack's rank
    b: list[jax.Array]  # of (r, out)
    scales: jax.Array  # (N,)
    counts: jax.Array  # (N, 2) entries of A and of B that pruning keeps
    keys: jax.Array  # (N,)


class Options(NamedTuple):
    """The arguments of :func:`combine` that shape the computation."""

    rule: Rule
    rank: int  # of the new adapter, 0 where each module keeps its own
    density: float
    sign: str | None
    clamp: float | None


@checked
def combine(
    adapters: Sequence[tuple[Mapping[str, Any], LoraSpec]],
    weights: Sequence[float] | jax.Array | np.ndarray,
    method: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    key: jax.Array | None = None,
    clamp: float | None = None,
) -> tuple[dict[str, Any], LoraSpec]:
    """One adapter made of several, by the arithmetic of PEFT's ``add_weighted_adapter``.

    A module that only some of them adapt is combined of those. The result depends on names, not on stacking.

    Args:
      adapters: ``(adapters, spec)`` of each, plain LoRA or rsLoRA of one base. A single one is only scaled by its
        weight, as ``linear`` does and whatever the method, as in PEFT.
      weights: one finite number each; negative ones subtract.
      method: one of ``METHODS``.
      rank: of the new adapter, for ``svd`` and ``*_svd``; default the greatest rank in any spec. Where a module has
        fewer singular values, the rest is zero.
      density: the fraction of entries that pruning keeps, in (0, 1]; for ``ties*``, ``dare*``, ``magnitude_prune*``.
      sign: how ``*ties*`` elect a sign: of the sum of the entries, or of the sum of their signs.
      key: a PRNG key for ``dare*``; a mask depends on it, the module's name, the adapter's number and the factor.
      clamp: for ``svd`` and ``*_svd``: both factors are cut to plus and minus this quantile of their entries.

    Returns:
      ``(adapters, spec)``, in the widest dtype given. Ranks are the adapters' own for the methods that take factors by
      themselves; their greatest ranks added up for ``cat``; ``rank`` for the others.

    Raises:
      InputError: adapters that cannot be combined, ranks that differ where they must not, an argument that is missing,
        out of range or of no use to ``method``.
    """
    check(len(adapters), weights, method, rank, density, sign, key, clamp)
    targets, specs = common_target_modules(adapters), [spec for _, spec in adapters]
    method = "linear" if len(adapters) == 1 else method
    rule = RULES[method.removesuffix("_svd")] if method not in ("cat", "svd") else RULES["linear"]
    options = Options(rule, _new_rank(specs, method, rank), density or 1.0, sign if rule.elect else None, clamp)
    combined: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    for path in sorted({path for found in targets for path in found}):
        parts = _parts(path, adapters, targets, weights)
        ranks |= _ranks(parts, options)
        if method == "cat":
            a, b = _concatenated(parts, options.rank)
        else:
            make = _svd if method.endswith("svd") else _factors
            weights_here = jnp.array([part.weight for part in parts], parts[0].a.dtype)
            a, b = _each(make, _modules(parts, options, key), weights_here, options)
        used = np.any([part.target.ranks for part in parts], axis=0)
        pair = {
            leaf: (x * _like(used, x)).reshape(*parts[0].target.stack, *x.shape[1:])
            for leaf, x in (("lora_a", a), ("lora_b", b))
        }
        combined = tree.set_in(combined, path, pair)
    return combined, union_spec(specs, ranks)


def _new_rank(specs: Sequence[LoraSpec], method: str, rank: int | None) -> int:
    """PEFT's rule, by what the specs say and not by what is adapted; 0 where each module keeps its own."""
    greatest = [max(spec.rank, *(r for _, r in items(spec.rank_pattern)), 0) for spec in specs]
    if method == "cat":
        return sum(greatest)
    return (rank or max(greatest)) if method.endswith("svd") else 0


def _parts(path: Path, adapters: Any, targets: Any, weights: Any) -> list[Part]:
    """What the adapters have at ``path``, in one dtype."""
    found = []
    for i, ((given, _), own) in enumerate(zip(adapters, targets, strict=True)):
        if target := own.get(path):
            pair = tree.get_in(given, path)
            a, b = (jnp.asarray(pair[leaf]) for leaf in ("lora_a", "lora_b"))
            a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
            found.append(Part(i, target, a, b, float(weights[i])))
    dtype = jnp.result_type(jnp.float32, *(part.a for part in found), *(part.b for part in found))
    return [part._replace(a=part.a.astype(dtype), b=part.b.astype(dtype)) for part in found]


def _ranks(parts: Sequence[Part], options: Options) -> dict[str, int]:
    """The new rank of each module that any of ``parts`` adapts."""
    ranks = {}
    for i, name in enumerate(parts[0].target.names):
        given = {part.number: part.target.ranks[i] for part in parts if part.target.ranks[i]}
        if not options.rank and len(set(given.values())) > 1:
            told = ", ".join(f"{r} in adapter {j}" for j, r in given.items())
            raise InputError(f"{name} has rank {told}: only cat, svd and *_svd combine different ranks")
        if given:
            ranks[name] = options.rank or max(given.values())
    return ranks


def _concatenated(parts: Sequence[Part], rank: int) -> tuple[jax.Array, jax.Array]:
    factors = [part.weight * np.array(part.target.scales) for part in parts]
    a = jnp.concatenate([p.a * _like(f, p.a) for p, f in zip(parts, factors, strict=True)], -1)
    b = jnp.concatenate([part.b for part in parts], 1)
    used = np.concatenate([np.arange(p.target.rank) < np.array(p.target.ranks)[:, None] for p in parts], -1)
    order = np.argsort(~used, axis=-1, kind="stable")[:, :rank]  # what is in use comes first, as in PEFT
    a, b = jnp.take_along_axis(a, order[:, None, :], -1), jnp.take_along_axis(b, order[:, :, None], 1)
    return _pad(a, rank, -1), _pad(b, rank, 1)


def _modules(parts: Sequence[Part], options: Options, key: jax.Array | None) -> Module:
    """The modules of a stack, and a key for each of them and each adapter, made of names and numbers alone."""
    scales = np.array([part.target.scales for part in parts]).T
    counts = [[[int(options.density * r * n) for n in p.target.size] for r in p.target.ranks] for p in parts]
    marks = jnp.array([zlib.crc32(name.encode()) for name in parts[0].target.names], jnp.uint32)
    numbers = jnp.array([part.number for part in parts])
    key = jax.random.key(0) if key is None else key
    keys = jax.vmap(lambda m: jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, m), i))(numbers))(marks)
    a, b = [part.a for part in parts], [part.b for part in parts]
    return Module(a, b, jnp.asarray(scales, a[0].dtype), jnp.array(counts).swapaxes(0, 1), keys)


@partial(jax.jit, static_argnames=("make", "options"))
def _each(make: Any, modules: Module, weights: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """``make`` of each module in turn: one delta is in memory at a time, and see ``optimize/gram.py`` on CPUs."""
    found: tuple[jax.Array, jax.Array] = jax.lax.map(lambda module: make(module, weights, options), modules)
    return found


def _factors(module: Module, weights: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    rank = max(a.shape[-1] for a in module.a)
    a = jnp.stack([_pad(x.T, rank, 0) for x in module.a])  # masks are drawn with the rank in front, so that
    b = jnp.stack([_pad(x, rank, 0) for x in module.b])  # padding does not change them
    both = weights * module.scales
    roots = jnp.sqrt(jnp.abs(both))
    new_a = mix(
        _pruned(a, module.counts[:, 0], module.keys, 0, options), jnp.where(both < 0, -roots, roots), options.sign
    )
    return new_a.T, mix(_pruned(b, module.counts[:, 1], module.keys, 1, options), roots, options.sign)


def _svd(module: Module, weights: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    if options.rule == RULES["linear"]:
        factors = [b * factor for b, factor in zip(module.b, weights * module.scales, strict=True)]
        u, s, v = svd_of_product(jnp.concatenate(module.a, -1), jnp.concatenate(factors))
    else:
        deltas = jnp.stack([scale * (a @ b) for a, b, scale in zip(module.a, module.b, module.scales, strict=True)])
        counts = jnp.full(len(deltas), int(options.density * deltas[0].size))
        merged = mix(_pruned(deltas, counts, module.keys, 2, options), weights, options.sign)
        u, s, v = jnp.linalg.svd(merged, full_matrices=False)
    a, b = truncated(u, s, v, options.rank, options.clamp)
    return _pad(a, options.rank, 1), _pad(b, options.rank, 0)


def _pruned(x: jax.Array, counts: jax.Array, keys: jax.Array, factor: int, options: Options) -> jax.Array:
    """``x`` (N, ...) pruned one by one; ``factor`` tells A, B and their product (0, 1, 2) apart in the keys."""
    if options.rule.prune == "largest":
        return x * jax.vmap(keep_largest)(x, counts)
    if options.rule.prune == "random":
        kept = jax.vmap(lambda k: keep_random(jax.random.fold_in(k, factor), x.shape[1:], options.density))(keys)
        return x * kept / options.density
    return x


def _like(numbers: np.ndarray, x: jax.Array) -> jax.Array:
    return jnp.asarray(numbers, x.dtype).reshape(-1, 1, 1)


def _pad(x: jax.Array, rank: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(0, rank - x.shape[axis]))
    return jnp.pad(x, widths)
