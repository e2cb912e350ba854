"""Parts of the adapters that stay as they are, by pattern.

::

    mask = freeze_mask(params, adapters, spec, ["layers.0", "lora_a"])       # bools, broadcastable to the leaves
    grads = jax.grad(lambda adapters: loss(params, stop_frozen_gradients(adapters, mask)))(adapters)
    tx = freeze(optax.chain(optax.clip_by_global_norm(1.0), stable_lora(1e-4)), mask)

Names are those of single layers, leaves included: ``model.layers.3.self_attn.q_proj.lora_a``, of what is trained in
full the module's own and the parameter's: ``lm_head.kernel``; of what modules share ``lora_shared.lora_bank``. **The
rule** is that of ``rank_pattern``: a pattern is a regular expression for the end of a name, here of the leaf's or of
any module that holds it. So ``layers.1``, ``q_proj``, ``lora_b`` and ``layers.0.*lora_a`` are patterns; mind that
``layers.1.*`` means ``layers.10``, too.

:func:`stop_frozen_gradients` keeps gradients away, and a leaf that is frozen whole costs no backward pass.
:func:`freeze` wraps last: the optimizer sees zero gradients there and its updates are dropped, so that frozen numbers
stay to the bit whatever decays, shrinks or transforms them, and pairs that are not frozen train as if those were none
of the optimizer's.

One factor of a pair frozen alone means: the other is trained by the optimizer's rule with that gradient zero.

* AdamW, Stable-LoRA, LoRA+, ALLoRA, LoRA-Pre, LoRA-FA, scaled GD and AdamW, LoRA-RITE: the rule of one factor reads at
  most the value of the other, so it is what it would be without training the other. (A frozen A does not shrink; the
  gpt2 and mistral variants of scaled AdamW see A as weight decay would have left it.)
* AltLoRA takes turns, so that every other step does nothing (its code's variant does not).
* OPLoRA fits each factor to what the other would have become: with lam > 0 its step is inexact.
* LoRA-Pro leaves what lies in the span of B to A: with A frozen, B does not learn along its own columns (with
  ``projection="symmetric"`` at half the rate).
* Stiefel-LoRA moves a product from one factor to the other, which would change the function: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax.lora.full_parameters import TrainedParameter, trained_parameters
from stablelora_jax.lora.leaves import is_frozen, leaf_shapes
from stablelora_jax.lora.names import hits, require_match
from stablelora_jax.lora.pairs import TargetModule, is_pair
from stablelora_jax.lora.parametrizations.lora import SHARED
from stablelora_jax.lora.shared import shared_shapes
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import match_target_modules
from stablelora_jax.optimizers.batched_pairs import PairwiseState
from stablelora_jax.optimizers.stable_lora import OFF, ON, ShrinkUntilStableState
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError


@checked
def freeze_mask(
    params: Mapping[str, Any], adapters: Mapping[str, Any], spec: LoraSpec, patterns: str | Iterable[str]
) -> Any:
    """Which numbers of ``adapters`` the patterns freeze.

    Args:
      params: the base; only shapes are read, ``jax.ShapeDtypeStruct`` will do.
      adapters: as made by ``init_adapters`` for ``spec``; only shapes are read, so they may be traced.
      spec: the spec of the adapters.
      patterns: regular expressions for the ends of names, see the module's docstring; none freezes nothing.

    Returns:
      A tree like ``adapters`` of NumPy bools, shape of the stack axes and ones: (L, 1, 1) for ``lora_a`` (L, in, r).

    Raises:
      InputError: a pattern that matches nothing, or patterns that leave nothing to train; as ``describe`` besides.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    targets = match_target_modules(params, adapters, spec)
    rows = [row for target in targets.values() for row in _pair_rows(target, spec)]
    rows += [row for path, shape in shared_shapes(targets, spec).items() for row in _shared_rows(path, shape)]
    rows += [row for leaf in trained_parameters(params, spec).values() for row in _full_rows(leaf)]
    every = sorted({name for _, names, used, _ in rows for name, one in zip(names, used, strict=True) if one})
    found = hits(patterns, {holder for name in every for holder in _holders(name)})
    modules = sorted({name.rpartition(".")[0] for name in every})
    for pattern in patterns:
        require_match("freeze:", pattern, pattern in found, [*every, *modules])
    mask: Any = {}
    for path in targets:  # which need not train anything of their own
        mask = tree.set_in(mask, path, {})
    for place, names, used, shape in rows:
        hit = np.array([_freezes(patterns, name) for name in names])
        hit = np.where(used, hit, hit[np.array(used)].all())  # padding goes with the others
        mask = tree.set_in(mask, place, hit.reshape(shape))
    if all(leaf.all() for leaf in jax.tree.leaves(mask)):
        raise InputError(f"freeze: {', '.join(patterns)} leave nothing to train: name less")
    return mask


def stop_frozen_gradients(adapters: Any, mask: Any) -> Any:
    """``adapters`` for the forward pass, through which no gradient flows to what ``mask`` freezes."""

    def held(one: np.ndarray, leaf: jax.Array) -> jax.Array:
        if not one.any():
            return leaf
        constant = jax.lax.stop_gradient(leaf)
        return constant if one.all() else jnp.where(one, constant, leaf)

    return jax.tree.map(held, mask, adapters)


@checked
def freeze(tx: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """``tx`` whose updates are zero where ``mask``, of :func:`freeze_mask`, is True; its state is that of ``tx``.

    Wrap it last, around clipping and ``shrink_until_stable``: what comes after it in a chain may move frozen numbers.
    Zeros are negative, since ``x + (-0.0)`` is x to the bit, that of a zero's sign too. Latches of Stable-LoRA are off
    from the start where A is frozen.

    Raises:
      InputError: in ``init``, one factor of a pair frozen alone for an optimizer that moves both (Stiefel-LoRA).
    """
    if not any(one.any() for one in jax.tree.leaves(mask)):
        return tx
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        state = inner.init(params)
        _require_whole_pairs(state, mask)
        return jax.tree.map(_settle, state, is_leaf=lambda node: isinstance(node, ShrinkUntilStableState))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = inner.update(_zeroed(updates, 0.0), state, params, **extra)
        return _zeroed(updates, -0.0), state

    def _zeroed(updates: Any, zero: float) -> Any:
        def zeroed(one: np.ndarray, leaf: jax.Array) -> jax.Array:
            return jnp.where(one, jnp.asarray(zero, leaf.dtype), leaf) if one.any() else leaf

        return jax.tree.map(zeroed, mask, updates)

    def _settle(node: Any) -> Any:
        if not isinstance(node, ShrinkUntilStableState):
            return node

        def settled(path: Any, latch: jax.Array) -> jax.Array:
            one: Any = tree.get_in(mask, (*tree.keys_of(path), "lora_a"))
            return jnp.where(one[..., 0, 0] & (latch == ON), OFF, latch).astype(latch.dtype)

        inside = jax.tree.map(_settle, node.inner, is_leaf=lambda n: isinstance(n, ShrinkUntilStableState))
        return node._replace(shrinking=jax.tree_util.tree_map_with_path(settled, node.shrinking), inner=inside)

    return optax.GradientTransformationExtraArgs(init, update)


def _require_whole_pairs(state: Any, mask: Any) -> None:
    """Refuse a state with ``moves_both``, the name of its optimizer, at a pair of which one factor is frozen alone."""

    def moves_both(node: Any) -> bool:
        return hasattr(node, "moves_both")

    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, PairwiseState))
    for pairs in (node.pairs for node in nodes if isinstance(node, PairwiseState)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(pairs, is_leaf=moves_both):
            pair: Any = tree.get_in(mask, tree.keys_of(path)) if moves_both(leaf) else None
            if is_pair(pair) and (pair["lora_a"] != pair["lora_b"]).any():
                name = ".".join(tree.keys_of(path))
                raise InputError(
                    f"freeze: {leaf.moves_both} moves both factors of {name} at once: freeze both or neither"
                )


def _freezes(patterns: Sequence[str], name: str) -> bool:
    return bool(patterns) and bool(hits(patterns, _holders(name)))


def _holders(name: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _pair_rows(target: TargetModule, spec: LoraSpec) -> list[Any]:
    """(place, names, which layers have it, shape of the mask) of each leaf beside and in a pair."""
    own = leaf_shapes(target, spec).items()
    shapes = {leaf: shape[len(target.stack) :] for leaf, shape in own if not is_frozen(leaf)}
    used = [rank > 0 for rank in target.ranks]
    return [
        ((*target.path, leaf), [f"{name}.{leaf}" for name in target.names], used, target.stack + (1,) * len(shape))
        for leaf, shape in shapes.items()
    ]


def _shared_rows(path: tree.Path, shape: tuple[int, ...]) -> list[Any]:
    """Of what modules share, frozen as a whole or not."""
    place = (SHARED, *path)
    return [] if is_frozen(path[-1]) else [(place, [".".join(place)], [True], (1,) * len(shape))]


def _full_rows(leaf: TrainedParameter) -> list[Any]:
    names = [f"{name}.{leaf.path[-1]}" for name in leaf.names]
    shape = ((len(leaf.chosen),) if leaf.stack else ()) + (1,) * len(leaf.own)
    return [(leaf.place, names, [True] * len(names), shape)]
