"""A rule for pairs, written once for a batch of pairs of one shape, over a whole tree of adapters.

With A = ``lora_a`` (n, r) and B the transpose of ``lora_b`` (m, r), both *tall*, the change of the kernel is
``s A B^T`` (n = in, m = out) and a rule reads the same for either factor::

    gradients   gA = s G B,  gB = s G^T A        G (n, m) the gradient of the kernel, which nobody computes
    Gram        A^T A,  B^T B                    (r, r)

``pairwise`` gathers the pairs of a tree, stacked or not, into one batch for each shape, at least in float32, so that
200 layers are a handful of calls. State lies at the pairs' paths with their stack axes, as the adapters do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax.lora.pairs import is_pair
from stablelora_jax.optimizers.pair_tree import Scale, map_pairs, whole
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError


class Pair(NamedTuple):
    """Both factors of a batch of pairs, tall, float32 or wider; also their gradients, updates and moments."""

    a: jax.Array  # (..., n, r)
    b: jax.Array  # (..., m, r), the transpose of lora_b


class Group(NamedTuple):
    """All pairs of one shape; the leading axis of every leaf counts them."""

    grads: Pair
    params: Pair
    state: Any
    scale: jax.Array  # (P,), in the factors' dtype
    kernel_grads: jax.Array | None = None  # G (P, n, m), where the caller of ``update`` gave them


class PairwiseState(NamedTuple):
    """State of :func:`pairwise`."""

    count: jax.Array  # type: ignore[assignment]  # updates so far, int32 scalar
    pairs: Any  # at each pair's path what ``first_state`` made, with the pair's stack axes; None elsewhere


def pairwise(
    first_state: Callable[[Pair], Any],
    update_groups: Callable[[Sequence[Group], jax.Array, Mapping[str, Any]], Sequence[tuple[Pair, Any]]],
    scale: Scale = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """A transformation of pairs from a rule for batches of same-shaped pairs; other leaves pass through unchanged.

    Args:
      first_state: from a pair's factors (..., n, r), (..., m, r) to its state: a tree of arrays with the same leading
        axes.
      update_groups: ``(groups, count, extra) -> [(updates, state) of each group]``, one group for each shape; ``count``
        is the number of updates before this one, ``extra`` holds the extra arguments of ``update``.
      scale: handed to the rule with each group.

    Columns of A whose row of B is zero too, the padding of unequal ranks, get no update. A pair of which a gradient is
    not finite gets NaN, whatever the rule makes of it: what is wrong is seen.
    """

    def init(params: Any) -> PairwiseState:
        jax.tree_util.tree_map_with_path(lambda *at: _require_scale(scale, *at), params, is_leaf=is_pair)
        return PairwiseState(jnp.zeros((), jnp.int32), map_pairs(lambda pair: first_state(tall(pair)), params))

    def update(grads: Any, state: PairwiseState, params: Any = None, **extra: Any) -> tuple[Any, PairwiseState]:
        found = _find(params, grads, state.pairs, scale, extra.get("kernel_grads"))
        shapes: dict[Any, list[Any]] = {}
        for path, g in found.items():
            shapes.setdefault((g.params.a.shape[-2:], g.params.b.shape[-2:], g.params.a.dtype), []).append(path)
        groups = [_gather([found[path] for path in paths]) for paths in shapes.values()]
        with jax.default_matmul_precision("float32"):  # GPUs and TPUs would round to fewer bits
            results = settled(update_groups(groups, state.count, extra), groups)
        new: dict[Any, Any] = {}
        for paths, group, (moved, after) in zip(shapes.values(), groups, results, strict=True):
            in_use, known = used(group.params)[:, None, :], _all_finite(group.grads)
            moved = Pair(*(jnp.where(known, jnp.where(in_use, leaf, 0), jnp.nan) for leaf in moved))
            stacks = [found[path].scale.shape for path in paths]
            new |= _scatter(paths, stacks, (moved, after))
        return _put(new, grads, params, state)

    return optax.GradientTransformationExtraArgs(init, update)


def tall(pair: Mapping[str, jax.Array]) -> Pair:
    """The factors of a pair, tall and at least in float32."""
    a, b = (jnp.asarray(pair[name]) for name in ("lora_a", "lora_b"))
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return Pair(a.astype(dtype), jnp.swapaxes(b, -1, -2).astype(dtype))


def used(pair: Pair) -> jax.Array:
    """Which columns are in use, (..., r): those that are zero in both factors pad a stack of unequal ranks."""
    return (pair.a != 0).any(-2) | (pair.b != 0).any(-2)


def _all_finite(pair: Pair) -> jax.Array:
    """Whether all numbers of a pair are finite, (P, 1, 1)."""
    a, b = (jnp.isfinite(x).all(axis=(-2, -1), keepdims=True) for x in pair)
    return a & b


def settled(results: Sequence[tuple[Pair, Any]], groups: Sequence[Group]) -> list[tuple[Pair, Any]]:
    """A rule's results in the dtypes of the factors and of the state: under x64, ``b1**count`` is a float64."""

    def like(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda x, y: x.astype(y.dtype), new, old)

    return [(like(step, g.params), like(state, g.state)) for (step, state), g in zip(results, groups, strict=True)]


def value(number: Any, count: jax.Array) -> Any:
    """A scalar, or a schedule's scalar after ``count`` updates."""
    return number(count) if callable(number) else number


def over(x: jax.Array, root: jax.Array) -> jax.Array:
    """``x / root`` for ``root >= 0``; zero where the root is, NaN where it is NaN."""
    return jnp.where(root == 0, 0, x / jnp.where(root == 0, 1, root))


def hf_adam(
    p: jax.Array, h: jax.Array, mu: jax.Array, nu: jax.Array, b1: Any, b2: Any, eps: Any, step: Any, decay: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam as transformers had it: eps outside the bias correction, which is in ``step``; decay comes last."""
    mu, nu = b1 * mu + (1 - b1) * h, b2 * nu + (1 - b2) * h**2
    return (1 - decay) * (p - step * over(mu, jnp.sqrt(nu) + eps)), mu, nu


def _require_scale(scale: Scale, path: Any, node: Any) -> None:
    """Refuse a scale that has no positive number, or not one for each layer, for the pair at ``path``."""
    if not whole(path, node):
        return
    given, stack = _at(scale, path, "scale: make it with scales(adapters, spec)"), node["lora_a"].shape[:-2]
    name, shape = jax.tree_util.keystr(path, simple=True, separator="."), np.shape(given)
    if not jnp.issubdtype(jnp.result_type(given), jnp.number) or shape not in ((), stack):
        raise InputError(f"{name}: scale must be a number or an array of shape {stack}, see scales(), not {shape}")
    inside = isinstance(given, jax.core.Tracer) or (np.asarray(given) >= (0 if shape else 1e-30)) & np.isfinite(given)
    if not np.all(inside):
        raise InputError(f"{name}: scale must be positive, not {given}: alpha/r, or scales(adapters, spec)")


def _find(params: Any, grads: Any, states: Any, scale: Scale, kernel_grads: Any) -> dict[Any, Group]:
    """Every whole pair by its key path, with its own stack axes still."""
    found: dict[Any, Group] = {}

    def keep(path: Any, node: Any, grad: Any, state: Any) -> None:
        if not whole(path, node):
            return
        pair = tall(node)
        stack, dtype = pair.a.shape[:-2], pair.a.dtype
        s = jnp.broadcast_to(_at(scale, path, "scale: make it with scales(adapters, spec)"), stack).astype(dtype)
        full = None
        if kernel_grads is not None:
            full = jnp.asarray(_at(kernel_grads, path, "kernel_grads: give the gradients of the base's parameters"))
            full = full.astype(dtype).reshape(*stack, pair.a.shape[-2], pair.b.shape[-2])
        own = Pair(*(g.astype(dtype) for g in tall(grad)))
        found[path] = Group(own, pair, state, jnp.where(s == 0, 1, s), full)  # 0: a layer that is not adapted

    jax.tree_util.tree_map_with_path(keep, params, grads, states, is_leaf=is_pair)
    return found


def _at(given: Any, path: Any, way_out: str) -> Any:
    """What a tree of numbers, or of modules' kernels, holds at ``path``; a number for all pairs as it is."""
    if isinstance(given, int | float | jax.Array | np.ndarray | np.number):
        return given
    keys: Any = tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path)
    at = tree.get_in(given, keys)
    at = at.get("kernel") if isinstance(at, Mapping) else at
    if not isinstance(at, int | float | jax.Array | np.ndarray | np.number):
        raise InputError(f"{'.'.join(map(str, keys))} has no entry in {way_out}")
    return at


def _gather(members: Sequence[Group]) -> Group:
    """Pairs of one shape with their stack axes flattened and joined."""

    def flat(member: Group) -> Any:
        depth = member.scale.ndim
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[depth:]), member)

    found: Group = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *map(flat, members))
    return found


def _scatter(paths: Sequence[Any], stacks: Sequence[tuple[int, ...]], batch: Any) -> dict[Any, Any]:
    """The inverse of :func:`_gather` for one batch of results."""
    ends = np.cumsum([math.prod(stack) for stack in stacks]).tolist()
    starts = [0, *ends[:-1]]

    def part(start: int, end: int, stack: tuple[int, ...]) -> Any:
        return jax.tree.map(lambda leaf: leaf[start:end].reshape(*stack, *leaf.shape[1:]), batch)

    return {path: part(*cut) for path, *cut in zip(paths, starts, ends, stacks, strict=True)}


def _put(new: Mapping[Any, Any], grads: Any, params: Any, state: PairwiseState) -> tuple[Any, PairwiseState]:
    """Updates laid into the tree of ``grads``, in the dtypes of the parameters, and the state after them."""

    def factors(path: Any, node: Any, grad: Any) -> Any:
        if path not in new:
            return grad
        a, b = new[path][0]
        own = {"lora_a": a, "lora_b": jnp.swapaxes(b, -1, -2)}
        return type(grad)({**grad, **{name: leaf.astype(node[name].dtype) for name, leaf in own.items()}})

    def after(path: Any, node: Any, before: Any) -> Any:
        return new[path][1] if path in new else before

    updates = jax.tree_util.tree_map_with_path(factors, params, grads, is_leaf=is_pair)
    pairs = jax.tree_util.tree_map_with_path(after, params, state.pairs, is_leaf=is_pair)
    return updates, PairwiseState(optax.safe_increment(state.count), pairs)
