"""Next-token cross-entropy that never holds the logits of all tokens.

Logits are computed for a chunk of tokens at a time. In training the gradient of each chunk is computed with its loss;
the backward pass then has no matrix product left: two products with the head instead of three (as in Liger's
``fused_linear_cross_entropy``, arXiv 2410.10989, section 3.2). A chunk takes some tokens of every row, so that rows may
be on different devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Shaped

CHUNK_BYTES = 2**26  # of a chunk's logits in float32
Logits = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]  # (trained, frozen, x of a chunk, its number) -> logits


def token_log_probs(logits: Float[jax.Array, "B T V"], tokens: Int[ArrayLike, "B T"]) -> Float[jax.Array, "B T"]:
    """Log-probability of each token given those before it.

    Args:
      logits: float32 or wider.
      tokens: int32; one outside the vocabulary gives NaN.

    Returns:
      Entry t belongs to ``tokens[:, t]``, in the dtype of ``logits``; entry 0, which nothing predicts, is 0.

    Example::

      >>> token_log_probs(jnp.zeros((1, 3, 2)), jnp.array([[0, 1, 1]])).round(3).tolist()
      [[0.0, -0.6930000185966492, -0.6930000185966492]]
    """
    logits, targets = logits[:, :-1], jnp.asarray(tokens)[:, 1:]
    return jnp.pad(_log_probs(logits, targets), ((0, 0), (1, 0)))


def chunked_cross_entropy(
    logits: Logits,
    trained: Any,
    frozen: Any,
    x: Float[jax.Array, "B K D"],
    targets: Int[jax.Array, "B K"],
    weights: Shaped[jax.Array, "B K"],
    chunk: int,
) -> Float[jax.Array, ""]:
    """The sum of ``-weights * log p(targets)``, a scalar in the dtype of the logits.

    The arguments are those of :func:`cross_entropy_of_rows`.
    """
    return cross_entropy_of_rows(logits, trained, frozen, x, targets, weights, chunk)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def cross_entropy_of_rows(
    logits: Logits,
    trained: Any,
    frozen: Any,
    x: Float[jax.Array, "B K D"],
    targets: Int[jax.Array, "B K"],
    weights: Shaped[jax.Array, "B K"],
    chunk: int,
) -> tuple[Float[jax.Array, ""], Float[jax.Array, " B"]]:
    """The sum of ``-weights * log p(targets)`` and its parts by row, in the dtype of the logits.

    Gradients flow through the sum alone: its parts are constants.

    Args:
      logits: pure; maps (B, chunk, D) to (B, chunk, V), float32 or wider. It closes over no array.
      trained: the trained arrays of the head, a tree; often empty.
      frozen: its other arrays, which get no gradient.
      x: the input of the head.
      targets: one outside the vocabulary gives NaN.
      weights: 0 where nothing is to be predicted, whatever the target is. Not differentiated.
      chunk: tokens of a row whose logits exist at a time, see :func:`chunk_length`.
    """
    losses = _losses_and_gradients(logits, trained, frozen, x, targets, weights, chunk, False)[0]
    return losses.sum(), losses


def _forward(
    logits: Logits, trained: Any, frozen: Any, x: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[Any, Any]:
    losses, *gradients = _losses_and_gradients(logits, trained, frozen, x, targets, weights, chunk, True)
    return (losses.sum(), losses), gradients


def _backward(logits: Logits, chunk: int, gradients: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, ...]:
    d_trained, dx = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return d_trained, None, dx, None, None


cross_entropy_of_rows.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def log_probs_of_tokens(
    logits: Logits,
    trained: Any,
    frozen: Any,
    x: Float[jax.Array, "B K D"],
    targets: Int[jax.Array, "B K"],
    weights: Shaped[jax.Array, "B K"],
    chunk: int,
) -> Float[jax.Array, "B K"]:
    """``weights * log p(targets)`` in the dtype of the logits, each differentiable by itself.

    As :func:`cross_entropy_of_rows`, whose arguments these are, it computes gradients with the losses: those of x, each
    of which belongs to one token. Where the head is trained, its gradient is a sum over tokens whose weights are not
    known before the backward pass, which then forms the logits of each chunk again.
    """
    losses: jax.Array = _losses_and_gradients(
        logits, trained, frozen, x, targets, weights, chunk, False, by_token=True
    )[0]
    return -losses


def _forward_by_token(
    logits: Logits, trained: Any, frozen: Any, x: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[Any, Any]:
    given = trained, frozen, x, targets, weights
    if jax.tree.leaves(trained):
        return log_probs_of_tokens(logits, *given, chunk), (*given, None)
    losses, _, dx = _losses_and_gradients(logits, *given, chunk, True, by_token=True)
    return -losses, (trained, None, None, None, None, dx)


def _backward_by_token(logits: Logits, chunk: int, kept: Any, cotangents: jax.Array) -> tuple[Any, ...]:
    trained, frozen, x, targets, weights, dx = kept
    if dx is not None:
        return trained, None, (dx * -cotangents[..., None]).astype(dx.dtype), None, None
    weights = -weights.astype(cotangents.dtype) * cotangents
    _, d_trained, dx = _losses_and_gradients(logits, trained, frozen, x, targets, weights, chunk, True)
    return d_trained, None, dx, None, None


log_probs_of_tokens.defvjp(_forward_by_token, _backward_by_token)


def token_scores(
    logits: Callable[[jax.Array], jax.Array],
    x: Float[jax.Array, "B K D"],
    targets: Int[ArrayLike, "B K"],
    *,
    parts: int = 1,
) -> tuple[Float[jax.Array, "B K"], Bool[jax.Array, "B K"]]:
    """Log-probabilities of the tokens after ``x``, and whether each is the most likely one.

    Args:
      logits: maps (B, chunk, D) to (B, chunk, V).
      x: the input of the head.
      targets: the tokens.
      parts: devices over which the rows are split.
    """
    vocabulary, targets = jax.eval_shape(logits, x[:, :1]).shape[-1], jnp.asarray(targets)
    chunk = chunk_length(-(-x.shape[0] // parts), x.shape[1], vocabulary)

    def score(part: Any) -> tuple[jax.Array, jax.Array]:
        x, targets = part
        z = logits(x)
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        return _log_probs(z, targets), jnp.argmax(z, axis=-1) == targets

    scores = jax.lax.map(score, (split_chunks(x, chunk), split_chunks(targets, chunk)))
    joined: tuple[jax.Array, jax.Array] = jax.tree.map(lambda x: join_chunks(x, targets.shape[1]), scores)
    return joined


def chunk_length(rows: int, length: int, vocabulary: int, whole: int | None = None) -> int:
    """Tokens of a row in a chunk: the logits of a chunk take at most 64 MiB, and at most an eighth of all logits.

    At least 1. With the smallest number of chunks under these limits, the shortest chunk is taken, since padding after
    the end is multiplied, too.

    Args:
      rows: of a device.
      length: tokens of a row that have logits.
      vocabulary: V.
      whole: all tokens of a row, of which an eighth is taken; None: ``length``.

    Example::

      >>> chunk_length(rows=8, length=1024, vocabulary=32_000)
      64
    """
    most = min(CHUNK_BYTES // (4 * vocabulary), rows * (whole or length) // 8)
    count = -(-length // max(1, most // rows))
    return -(-length // count)


def split_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, K, ...) -> (chunks, B, chunk, ...), padded with zeros."""
    B, K = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -K % chunk), *((0, 0) for _ in x.shape[2:])))
    return x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def join_chunks(x: jax.Array, length: int) -> jax.Array:
    """The inverse of :func:`split_chunks` for K = ``length``."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _losses_and_gradients(
    logits: Logits,
    trained: Any,
    frozen: Any,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    with_gradients: bool,
    *,
    by_token: bool = False,
) -> tuple[Any, ...]:
    """The losses of the rows and, on request, the gradients of their sum with respect to ``trained`` and ``x``.

    With ``by_token`` the losses are (B, K).
    """
    targets = _without_negatives(jnp.where(weights == 0, 0, targets))
    parts = split_chunks(x, chunk), split_chunks(targets, chunk), split_chunks(weights, chunk)
    numbers = jnp.arange(parts[0].shape[0])
    shape: Any = jax.eval_shape(logits, trained, frozen, parts[0][0], numbers[0])

    def value(carry: Any, part: Any) -> tuple[Any, Any]:
        number, x, targets, weights = part
        z = logits(trained, frozen, x, number)
        losses = -_log_probs(z, targets) * weights
        return (carry, losses) if by_token else (carry + losses.sum(axis=1), None)

    def gradients(carry: Any, part: Any) -> tuple[Any, Any]:
        number, x, targets, weights = part
        z, pull = jax.vjp(lambda trained, x: logits(trained, frozen, x, number), trained, x)
        top = jax.lax.stop_gradient(z.max(axis=-1, keepdims=True))
        powers = jnp.exp(z - top)
        total = powers.sum(axis=-1, keepdims=True)
        right = jax.lax.broadcasted_iota(targets.dtype, z.shape, z.ndim - 1) == targets[..., None]
        chosen = jnp.take_along_axis(z, targets[..., None], axis=-1)
        losses = (jnp.log(total) + top - chosen)[..., 0] * weights
        d_trained, dx = pull(((powers / total - right) * weights[..., None]).astype(z.dtype))
        rows = jnp.zeros_like(carry[0]) if by_token else losses.sum(axis=1)
        return jax.tree.map(jnp.add, carry, (rows, d_trained)), (dx, losses if by_token else None)

    zeros = jnp.zeros(x.shape[0], shape.dtype)  # a sum for each row, which may be on different devices
    if not with_gradients:
        losses, tokens = jax.lax.scan(value, zeros, (numbers, *parts))
        return (join_chunks(tokens, x.shape[1]) if by_token else losses,)
    start = zeros, jax.tree.map(jnp.zeros_like, trained)
    (losses, d_trained), (dx, tokens) = jax.lax.scan(gradients, start, (numbers, *parts))
    return join_chunks(tokens, x.shape[1]) if by_token else losses, d_trained, join_chunks(dx, x.shape[1])


def _without_negatives(targets: jax.Array) -> jax.Array:
    """``targets`` with negative ones beyond any vocabulary: a look-up gives NaN instead of counting from the end."""
    return jnp.where(targets < 0, np.iinfo(targets.dtype).max, targets)


def _log_probs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, _without_negatives(targets)[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
