"""Decoding with a cache: one pass over the prompts, then a compiled loop of one token a step.

``variables`` is always an argument of the compiled functions, and the cache is donated. Lengths are padded to the
buckets of ``data.bucket``, so that a few programs serve all prompts; temperature, top-k, top-p, stop ids and keys are
traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax.typing import ArrayLike, DTypeLike

from stablelora_jax.data import bucket
from stablelora_jax.generation.sampling import Sampling, choose, row_keys
from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.block import accum_dtype
from stablelora_jax.models.cache import Cache, empty_cache, positions_of
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.utils.checked import as_dtype
from stablelora_jax.utils.errors import InputError, brief

Watch = Callable[[np.ndarray, np.ndarray], np.ndarray]
CHUNK = 16  # steps between two calls of ``watch``
STOPS = 8  # stop ids are padded to a multiple of it


class State(NamedTuple):
    """The carry of a step."""

    cache: Cache
    token: jax.Array  # (B,) int32: the newest, not yet in the cache
    position: jax.Array  # (B,) int32: of that token
    tokens: jax.Array  # (B, N) int32: all new ones, 0 after the end
    counts: jax.Array  # (B,) int32: number of new tokens
    done: jax.Array  # (B,) bool
    finite: jax.Array  # (B,) bool: whether all logits so far were finite
    step: jax.Array  # int32 scalar: columns of ``tokens`` that are filled


def decoder_of(model: Any) -> Decoder:
    """The decoder inside ``model``: itself, or the one that an ``Adapted`` or anything like it holds as ``.model``."""
    if isinstance(model, Decoder):
        return model
    if not hasattr(model, "model"):
        raise InputError(f"a model is a Decoder, or adapted(decoder, spec), not {type(model).__name__}")
    return decoder_of(model.model)


def generate_tokens(
    model: Any,
    variables: Mapping[str, Any],
    tokens: ArrayLike,
    mask: ArrayLike,
    *,
    max_new_tokens: int,
    settings: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    key: jax.Array | None = None,
    rows: ArrayLike | None = None,
    cache_dtype: DTypeLike | None = None,
    watch: Watch | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Continue the prompts of a batch, padded on either side, as tokenizers give them.

    Args:
      model: a ``Decoder``, or an object with its ``apply`` and with it as ``.model``; hashable.
      variables: ``{"params": ...}`` and, for an adapted model, ``"lora"``.
      tokens: (B, T) int.
      mask: (B, T), 1 at tokens and 0 at pads; a row without a token stays empty.
      max_new_tokens: the most tokens of a row.
      settings: from :func:`stablelora_jax.generation.sampling.sampling`; None is greedy.
      stop_ids: a row ends with the first of these, included.
      key: a PRNG key, for sampling.
      rows: (B,) int, the number of each row, for its PRNG key; default ``0 .. B-1``.
      cache_dtype: of keys and values; default the dtype of attention, with which the cache changes no logit.
      watch: called every few steps with the new tokens (B, N) and their counts (B,); gives (B,) bool, rows to end.

    Returns:
      New tokens (B, N) int32, 0 after each row's end, and their counts (B,).

    Raises:
      InputError: a token outside the vocabulary, a row longer than the model's positions, a cache dtype that is no
        float, an argument of another kind, or logits that are not finite.
    """
    decoder = decoder_of(model)
    if not isinstance(variables, Mapping) or not variables.get("params"):
        raise InputError('variables must hold "params", the parameters of the model')
    if not isinstance(settings, Sampling | None):
        raise InputError(f"settings must be what sampling() gives, not {settings!r:.60}")
    if unread := sorted(set(variables) - {"params"}) if model is decoder else []:
        raise InputError(f"a bare decoder does not read {unread[0]!r}: give adapted(model, spec), or banked(model)")
    tokens, mask = _compact(tokens, mask)
    _check(decoder.config, tokens, mask, max_new_tokens)
    T, N, B = bucket(tokens.shape[1]), bucket(max_new_tokens), tokens.shape[0]
    tokens, mask = (np.pad(x, ((0, 0), (0, T - x.shape[1]))) for x in (tokens.astype(np.int32), mask))
    stop_ids = token_ids(stop_ids, "stop_ids")
    stops = np.full(-(-max(1, len(stop_ids)) // STOPS) * STOPS, -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    keys = _keys(key, rows, B)
    dtype = _cache_dtype(cache_dtype, decoder)
    with _fitting():
        state = _start(model, variables, tokens, mask, settings, stops, keys, T + N, N, dtype)
    reached = 1
    while True:
        if not np.asarray(state.finite).all():
            raise InputError(
                "the model gives logits that are not finite: its parameters or adapters hold NaN or infinity"
            )
        if watch is not None:
            state = state._replace(done=state.done | watch(np.asarray(state.tokens), np.asarray(state.counts)))
        if reached >= max_new_tokens or bool(state.done.all()):
            return np.asarray(state.tokens[:, :max_new_tokens]), np.asarray(state.counts)
        reached = min(max_new_tokens, reached + CHUNK) if watch is not None else max_new_tokens
        state = _extend(model, variables, state, settings, stops, keys, reached)


@partial(jax.jit, static_argnums=(0, 7, 8, 9))
def _start(
    model: Any,
    variables: Any,
    tokens: jax.Array,
    mask: jax.Array,
    settings: Sampling | None,
    stops: jax.Array,
    keys: jax.Array,
    slots: int,
    new: int,
    dtype: DTypeLike,
) -> State:
    """Run the prompts (B, T) into an empty cache and choose the first new token of each."""
    config, (B, T) = decoder_of(model).config, tokens.shape
    last = T - 1 - jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32)
    empty = empty_cache(config, B, slots, dtype)
    logits, cache = model.apply(variables, tokens, positions_of(mask), cache=empty, logit_positions=last[:, None])
    counts, zero = jnp.zeros((B,), jnp.int32), jnp.zeros((), jnp.int32)
    before = mask.sum(axis=1, dtype=jnp.int32) - 1
    done = ~mask.any(axis=1)
    state = State(cache, counts, before, jnp.zeros((B, new), jnp.int32), counts, done, jnp.ones_like(done), zero)
    return _append(state, logits[:, 0], settings, stops, keys)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(
    model: Any, variables: Any, state: State, settings: Sampling | None, stops: jax.Array, keys: jax.Array, limit: int
) -> State:
    """Step until ``limit`` columns are filled or all rows are done."""

    def step(state: State) -> State:
        logits, cache = model.apply(variables, state.token[:, None], state.position[:, None], cache=state.cache)
        return _append(state._replace(cache=cache), logits[:, 0], settings, stops, keys)

    return jax.lax.while_loop(lambda s: (s.step < limit) & ~s.done.all(), step, state)


def _append(state: State, logits: jax.Array, settings: Sampling | None, stops: jax.Array, keys: jax.Array) -> State:
    token = jnp.where(state.done, 0, choose(logits, settings, keys, state.step))
    return State(
        state.cache,
        token,
        state.position + 1,
        jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        state.counts + ~state.done,
        state.done | (token[:, None] == stops[None]).any(axis=1),
        state.finite & (state.done | jnp.isfinite(logits).all(axis=-1)),
        state.step + 1,
    )


def _cache_dtype(given: DTypeLike | None, decoder: Decoder) -> np.dtype:
    """The dtype of keys and values."""
    dtype: np.dtype = as_dtype(accum_dtype(decoder.dtype) if given is None else given, "cache_dtype")
    if not jnp.issubdtype(dtype, jnp.floating) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise InputError(f"cache_dtype must be a float dtype that jax has here, not {dtype}")
    return dtype


def token_ids(ids: Any, name: str) -> tuple[int, ...]:
    """``ids``, a list or an array, as a tuple of int32; -1 matches no token.

    Raises:
      InputError: it is something else.
    """
    good = isinstance(ids, Sequence | np.ndarray) and not isinstance(ids, str | bytes) and np.shape(ids)[1:] == ()
    kind = int | np.integer
    if not good or not all(isinstance(i, kind) and not isinstance(i, bool) and -1 <= i < 2**31 for i in ids):
        raise InputError(f"{name} must be a list of token ids, not {ids!r:.60}")
    return tuple(int(i) for i in ids)


def _keys(key: Any, rows: Any, count: int) -> jax.Array:
    """One key for each of ``count`` rows."""
    numbers = np.arange(count) if rows is None else np.asarray(rows)
    if numbers.shape != (count,) or not np.issubdtype(numbers.dtype, np.integer):
        raise InputError(f"rows must be a whole number for each of {count} rows, not {rows!r:.60}")
    try:
        return row_keys(jax.random.key(0) if key is None else key, jnp.asarray(numbers, jnp.int32))
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"key must be a key such as jax.random.key(0), and rows int32, not {key!r:.60}") from None


@contextmanager
def _fitting() -> Iterator[None]:
    """Errors of missing or misshapen parameters as one line."""
    try:
        yield
    except FlaxError as error:
        raise InputError(f"the parameters are not those of the model: {brief(error)}") from None


def _compact(tokens: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same rows with all pads at the end, so that the side of padding changes nothing."""
    try:
        tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    except (TypeError, ValueError):
        raise InputError("tokens and mask must be arrays (B, T), of rows of one length") from None
    if tokens.ndim != 2 or tokens.shape != mask.shape or not mask.any():
        raise InputError(f"tokens {tokens.shape} and mask {mask.shape} must be (B, T), and the mask not empty")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"tokens must be whole numbers, not {tokens.dtype}")
    order = np.argsort(~mask, axis=1, kind="stable")[:, : mask.sum(axis=1).max()]
    tokens, mask = (np.take_along_axis(x, order, axis=1) for x in (tokens, mask))
    return np.where(mask, tokens, 0), mask


def _check(config: DecoderConfig, tokens: np.ndarray, mask: np.ndarray, new: int) -> None:
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        raise InputError(f"max_new_tokens must be a positive whole number, not {new!r}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise InputError(f"token id {wrong} is outside the model's vocabulary of {config.vocab_size}")
    if (longest := int(mask.sum(axis=1).max())) + new > config.max_position_embeddings:
        raise InputError(
            f"a prompt of {longest} tokens and max_new_tokens={new} exceed the model's "
            f"{config.max_position_embeddings} positions"
        )
