"""The loss of a batch under an adapted decoder, with logits at the loss tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from stablelora_jax.data import Batch
from stablelora_jax.lora.apply import Adapted
from stablelora_jax.lora.leaves import split_frozen, with_frozen
from stablelora_jax.lora.parametrizations.lora import SHARED
from stablelora_jax.models.decoder import head_path
from stablelora_jax.models.inputs import integers, token_indices
from stablelora_jax.training.cross_entropy import chunk_length, cross_entropy_of_rows, log_probs_of_tokens
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import get_in, set_in


def summed_loss(
    model: Adapted, variables: Mapping[str, Any], batch: Batch, keys: jax.Array | None = None, *, parts: int = 1
) -> jax.Array:
    """The sum over ``batch`` of ``-log p`` of the loss tokens, a scalar; logits exist for a chunk of tokens at a time.

    Args:
      model: the adapted decoder.
      variables: its ``params`` and, optionally, ``lora`` and ``lora_hp``, as ``model.apply`` takes them.
      batch: with ``loss_positions``, the head computes logits for these alone.
      keys: (B,) typed dropout keys of the rows; None: no dropout. An adapted head folds in the position of the token.
      parts: devices over which the rows are split, in a program over global arrays.

    A loss token outside the vocabulary gives NaN; ids of pads and of targets that are no loss tokens do not matter.

    Raises:
      InputError: a field of ``batch`` of another shape or kind.
    """
    return weighted_losses(model, variables, batch, keys, parts=parts)[0]


def weighted_losses(
    model: Adapted,
    variables: Mapping[str, Any],
    batch: Batch,
    keys: jax.Array | None = None,
    row_weights: ArrayLike | None = None,
    *,
    parts: int = 1,
) -> tuple[jax.Array, Float[jax.Array, " B"]]:
    """:func:`summed_loss` with the rows weighted by ``row_weights`` (B,), and its parts by row, which are constants.

    Raises:
      InputError: a field of ``batch`` of another shape or kind.
    """
    head, weights = _head(model, variables, _checked(batch), keys, parts)
    weights = weights if row_weights is None else weights * jnp.asarray(row_weights)[:, None]
    with jax.named_scope("loss"):  # in the names of operations, for a profile
        return cross_entropy_of_rows(*head[:-1], weights, head[-1])


def completion_log_probs(
    model: Adapted, variables: Mapping[str, Any], batch: Batch, keys: jax.Array | None = None, *, parts: int = 1
) -> Float[jax.Array, " B"]:
    """``log p`` of each row's loss tokens, summed, differentiable one by one; logits exist for a chunk at a time.

    The arguments are those of :func:`summed_loss`. A row without loss tokens gives 0.

    Raises:
      InputError: a field of ``batch`` of another shape or kind.
    """
    head, weights = _head(model, variables, _checked(batch), keys, parts)
    with jax.named_scope("loss"):
        return log_probs_of_tokens(*head[:-1], weights, head[-1]).sum(axis=1)


def _head(
    model: Adapted, variables: Mapping[str, Any], batch: Batch, keys: jax.Array | None, parts: int
) -> tuple[tuple[Any, ...], jax.Array]:
    """What :func:`.cross_entropy_of_rows` takes, but for the weights; and these."""
    at, weights = target_positions(batch)
    rngs = None if keys is None else {"dropout": keys}
    inputs = (batch.tokens, batch.positions, batch.segment_ids)
    reads = None if batch.loss_positions is None else jnp.maximum(at - 1, 0)
    x = model.apply(variables, *inputs, logit_positions=reads, rngs=rngs, method="hidden")
    targets = jnp.take_along_axis(batch.tokens, at, axis=1)
    config = model.model.config
    chunk = chunk_length(-(-x.shape[0] // parts), x.shape[1], config.vocab_size, batch.tokens.shape[1])
    path = head_path(config)
    head = get_in(variables, ("lora", *path)) or {}
    places = [place for place in (path, (SHARED,)) if get_in(variables["lora"], place)] if head else []
    trained = [split_frozen(get_in(variables["lora"], place))[0] for place in places]  # seeds and indices are integers
    drops, impl = None, None
    if keys is not None and head:  # by token: independent of the chunk length and of the other loss tokens
        drops = jax.random.key_data(keys), jnp.pad(at, ((0, 0), (0, -at.shape[1] % chunk)))
        impl = jax.random.key_impl(keys)
    frozen = jax.lax.stop_gradient(dict(variables)), drops

    def logits(trained: Any, frozen: Any, x: jax.Array, number: jax.Array) -> jax.Array:
        variables, drops = frozen
        for place, own in zip(places, trained, strict=True):
            held = split_frozen(get_in(variables["lora"], place))[1]
            variables = {**variables, "lora": set_in(variables["lora"], place, with_frozen(own, held))}
        apply: Callable[..., jax.Array] = partial(model.apply, method="logits")
        if drops is None:
            return apply(variables, x)
        keys, at = drops
        at = jax.lax.dynamic_slice_in_dim(at, number * chunk, chunk, axis=1)
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(jax.random.wrap_key_data(keys, impl=impl), at)
        if "lora_rows" in variables:  # a row for each token
            variables = {**variables, "lora_rows": jnp.repeat(variables["lora_rows"], chunk)}
        return apply(variables, x.reshape(-1, 1, x.shape[2]), rngs={"dropout": keys.ravel()}).reshape(*x.shape[:2], -1)

    return (logits, trained, frozen, x, targets, chunk), weights


def target_positions(batch: Batch) -> tuple[Int[jax.Array, "B K"], Shaped[jax.Array, "B K"]]:
    """Positions of tokens that may be loss tokens, and weights that are 1 (or true) where they are, else 0."""
    if batch.loss_positions is not None:
        at = jnp.asarray(batch.loss_positions)
        return at, at > 0
    T = batch.tokens.shape[1]
    at = jnp.broadcast_to((jnp.arange(T) + 1) % T, batch.tokens.shape)
    return at, jnp.take_along_axis(jnp.asarray(batch.loss_mask), at, axis=1) * (at > 0)


def _checked(batch: Batch) -> Batch:
    """``batch`` as JAX arrays, with shapes and dtypes checked."""
    tokens = integers(batch.tokens, "tokens")
    segments, positions = (integers(getattr(batch, name), name, tokens.shape) for name in ("segment_ids", "positions"))
    at = None if batch.loss_positions is None else token_indices(batch.loss_positions, "loss_positions", tokens)
    shape, kind = jnp.shape(batch.loss_mask), jnp.result_type(batch.loss_mask)
    if shape != tokens.shape or not (kind == np.bool_ or jnp.issubdtype(kind, jnp.number)):
        raise InputError(f"loss_mask must be 1 or 0 for each of the tokens {tokens.shape}, not {kind} {shape}")
    fields: Any = (tokens, jnp.asarray(batch.loss_mask), segments, positions, at)
    return Batch(*fields)
