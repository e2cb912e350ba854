"""Next-token cross-entropy that never holds the logits of all tokens.

Logits are made for a tile of tokens at a time. Training makes each tile's gradient in the same visit, so that the
backward pass has nothing left to multiply: two products with the head and not three (as Liger's
``fused_linear_cross_entropy`` does, arXiv 2410.10989, section 3.2). A tile takes some tokens of every row, so that rows
may lie on different devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

TILE_BYTES = 2**26  # of a tile's logits in float32
Logits = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]  # (trained, frozen, x of a tile, its number) -> logits


def token_log_probs(logits: jax.Array, tokens: ArrayLike) -> jax.Array:
    """Log-probability, in the dtype of ``logits``, of each token given those before it.

    Args:
      logits: (B, T, V), float32 or wider.
      tokens: (B, T) int32; one outside the vocabulary gives NaN.

    Returns:
      (B, T): entry t belongs to ``tokens[:, t]``; entry 0, which nothing predicts, is 0.
    """
    logits, targets = logits[:, :-1], jnp.asarray(tokens)[:, 1:]
    return jnp.pad(_log_probs(logits, targets), ((0, 0), (1, 0)))


def masked_cross_entropy(logits: jax.Array, tokens: ArrayLike, loss_mask: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """``(sum of -log p over the tokens whose loss_mask is 1, their number)``, both scalars in the dtype of ``logits``.

    The sum, not the mean: a mean over devices or micro-batches of unequal token counts is not the batch's mean. This is
    the definition that :func:`chunked_cross_entropy` is tested against.
    """
    mask = jnp.asarray(loss_mask, logits.dtype).at[:, 0].set(0)
    return -(token_log_probs(logits, jnp.where(mask == 0, 0, tokens)) * mask).sum(), mask.sum()


@partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def chunked_cross_entropy(
    logits: Logits, trained: Any, frozen: Any, x: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """The sum of ``-weights * log p(targets)``, a scalar in the dtype of the logits.

    Args:
      logits: pure; of (B, tile, D) it gives (B, tile, V), float32 or wider. It closes over no array.
      trained: what of the head has a gradient; often nothing.
      frozen: its other arrays, of which nothing is differentiated.
      x: (B, K, D), what the head reads.
      targets: (B, K) int32; one outside the vocabulary gives NaN.
      weights: (B, K); 0 where nothing is to be predicted, whatever the target is. Not differentiated.
      tile: tokens of a row that are seen together, see :func:`chunk_length`.
    """
    return _visit(logits, trained, frozen, x, targets, weights, chunk, learn=False)[0]


def _forward(
    logits: Logits, trained: Any, frozen: Any, x: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, Any]:
    loss, *gradients = _visit(logits, trained, frozen, x, targets, weights, chunk, learn=True)
    return loss, gradients


def _backward(logits: Logits, chunk: int, gradients: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    d_trained, dx = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
    return d_trained, None, dx, None, None


chunked_cross_entropy.defvjp(_forward, _backward)


def token_scores(
    logits: Callable[[jax.Array], jax.Array], x: jax.Array, targets: ArrayLike, *, parts: int = 1
) -> tuple[jax.Array, jax.Array]:
    """``(log p(targets), whether each is the likeliest)``, both (B, K), of the tokens after ``x`` (B, K, D).

    ``logits`` maps (B, tile, D) to (B, tile, V); over ``parts`` devices the rows are split.
    """
    vocabulary, targets = jax.eval_shape(logits, x[:, :1]).shape[-1], jnp.asarray(targets)
    chunk = chunk_length(-(-x.shape[0] // parts), x.shape[1], vocabulary)

    def score(part: Any) -> tuple[jax.Array, jax.Array]:
        x, targets = part
        z = logits(x)
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        return _log_probs(z, targets), jnp.argmax(z, axis=-1) == targets

    found = jax.lax.map(score, (tiles(x, chunk), tiles(targets, chunk)))
    return jax.tree.map(lambda x: untiled(x, targets.shape[1]), found)


def chunk_length(rows: int, length: int, vocabulary: int, whole: int | None = None) -> int:
    """How many of ``length`` tokens of each of ``rows`` rows make a tile: 64 MiB of logits or an eighth of all at most.

    But one at least. Of tiles as few as that allows, the shortest: what is filled up after the end is multiplied, too.
    All are the ``whole`` tokens of a row, where ``length`` of them are read: each tile reads the head anew.
    """
    most = min(TILE_BYTES // (4 * vocabulary), rows * (whole or length) // 8)
    count = -(-length // max(1, most // rows))
    return -(-length // count)


def tiles(x: jax.Array, chunk: int) -> jax.Array:
    """(B, K, ...) -> (tiles, B, tile, ...), filled up with zeros."""
    B, K = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -K % chunk), *((0, 0) for _ in x.shape[2:])))
    return x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def untiled(x: jax.Array, length: int) -> jax.Array:
    """The inverse of :func:`tiles` for K = ``length``."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _visit(
    logits: Logits,
    trained: Any,
    frozen: Any,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    *,
    learn: bool,
) -> tuple[Any, ...]:
    """The loss and, to ``learn``, its gradients with respect to ``trained`` and ``x``."""
    targets = _fenced(jnp.where(weights == 0, 0, targets))
    parts = tiles(x, chunk), tiles(targets, chunk), tiles(weights, chunk)
    numbers = jnp.arange(parts[0].shape[0])
    shape: Any = jax.eval_shape(logits, trained, frozen, parts[0][0], numbers[0])

    def value(carry: Any, part: Any) -> tuple[Any, Any]:
        number, x, targets, weights = part
        z = logits(trained, frozen, x, number)
        return carry - (_log_probs(z, targets) * weights).sum(axis=1), None

    def gradients(carry: Any, part: Any) -> tuple[Any, Any]:
        number, x, targets, weights = part
        z, pull = jax.vjp(lambda trained, x: logits(trained, frozen, x, number), trained, x)
        top = jax.lax.stop_gradient(z.max(axis=-1, keepdims=True))
        powers = jnp.exp(z - top)
        total = powers.sum(axis=-1, keepdims=True)
        right = jnp.arange(z.shape[-1]) == targets[..., None]
        chosen = jnp.take_along_axis(z, targets[..., None], axis=-1)
        loss = ((jnp.log(total) + top - chosen)[..., 0] * weights).sum(axis=1)
        d_trained, dx = pull(((powers / total - right) * weights[..., None]).astype(z.dtype))
        return jax.tree.map(jnp.add, carry, (loss, d_trained)), dx

    zeros = jnp.zeros(x.shape[0], shape.dtype)  # a sum for each row, which may lie on different devices
    if not learn:
        return (jax.lax.scan(value, zeros, (numbers, *parts))[0].sum(),)
    start = zeros, jax.tree.map(jnp.zeros_like, trained)
    (losses, d_trained), dx = jax.lax.scan(gradients, start, (numbers, *parts))
    return losses.sum(), d_trained, untiled(dx, x.shape[1])


def _fenced(targets: jax.Array) -> jax.Array:
    """``targets`` in which no negative one counts from the end: beyond any vocabulary, a look-up gives NaN."""
    return jnp.where(targets < 0, jnp.iinfo(targets.dtype).max, targets)


def _log_probs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, _fenced(targets)[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
