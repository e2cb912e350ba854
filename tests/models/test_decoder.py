"""The decoder's own laws: causality, segments, pads, dtypes, and English from a real checkpoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import load_pretrained
from stablelora_jax.models.architecture import Rope
from stablelora_jax.models.cache import Cache, empty_cache, positions_of
from stablelora_jax.models.rope import angles, frequencies, rotate
from stablelora_jax.utils.errors import InputError
from tests.helpers import ROPE_LLAMA3, jit, largest_difference, tiny_decoder, tokens


@functools.cache
def compiled(model):
    return jax.jit(model.apply)  # may be within another


def logits(model, params, *args, **kwargs):
    return compiled(model)({"params": params}, *args, **kwargs)


def test_causality():
    model, params = tiny_decoder()
    x = tokens(1, 9)
    y = logits(model, params, x)
    z = logits(model, params, x.at[0, 5].set((x[0, 5] + 1) % 31))
    assert np.array_equal(y[:, :5], z[:, :5]) and largest_difference(y[:, 5:], z[:, 5:]) > 1e-3


def test_packed_segments_equal_separate_rows():
    model, params = tiny_decoder()
    a, b = tokens(1, 4, seed=1), tokens(1, 6, seed=2)
    packed = jnp.concatenate([a, b, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 4 + [2] * 6 + [0] * 2])
    positions = jnp.array([[*range(4), *range(6), 0, 0]])
    y = logits(model, params, packed, positions, segments)
    assert largest_difference(y[:, :4], logits(model, params, a)) < 1e-5
    assert largest_difference(y[:, 4:10], logits(model, params, b)) < 1e-5
    changed = logits(model, params, packed.at[0, 1].set((packed[0, 1] + 1) % 31), positions, segments)
    assert np.array_equal(y[:, 4:], changed[:, 4:])


def test_pads_at_the_end_change_nothing():
    model, params = tiny_decoder()
    x = tokens(2, 5)
    padded = jnp.pad(x, ((0, 0), (0, 3)))
    assert largest_difference(logits(model, params, padded)[:, :5], logits(model, params, x)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_dtypes(tied, x64):
    for dtype, accum_dtype in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (jnp.float64, jnp.float64)):
        model, params = tiny_decoder(dtype=dtype, tie_word_embeddings=tied)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        assert jax.eval_shape(lambda p, model=model: logits(model, p, tokens()), params).dtype == accum_dtype


def test_float64_is_float64_inside(x64):
    """Float32 anywhere inside would leave an error of 1e-7, and a derivative by differences would be noise."""
    model, params = tiny_decoder(dtype=jnp.float64, rope=ROPE_LLAMA3, qkv_bias=True)
    cost = jax.jit(lambda p: jnp.sin(logits(model, p, tokens())).sum())
    direction = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(1).normal(size=p.shape)), params)
    move = lambda step: jax.tree.map(lambda p, d: p + step * d, params, direction)
    exact = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(cost)(params), direction)), strict=True))
    h = 1e-5
    assert abs((cost(move(h)) - cost(move(-h))) / (2 * h) - exact) < 1e-6 * abs(exact)


def test_bfloat16_is_near_float32():
    model, params = tiny_decoder()
    half, _ = tiny_decoder(dtype=jnp.bfloat16)
    low = logits(half, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), tokens())
    assert largest_difference(low, logits(model, params, tokens())) < 0.1


VARIANTS = {
    "full": {},
    "grouped": dict(num_key_value_heads=1, rope=ROPE_LLAMA3, tie_word_embeddings=True),
    "window": dict(model_type="mistral", windows=(3, 3, 3)),
    "windows": dict(model_type="qwen2", windows=(0, 3, 2), qkv_bias=True),
    "norms": dict(model_type="qwen3", qk_norm=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_in_parts_equals_reading_whole(variant):
    """A prompt, some tokens and single ones through a cache, beside rows that are padded left, right and within."""
    model, params = tiny_decoder(**VARIANTS[variant])
    x = tokens(3, 9)
    whole = logits(model, params, x)
    prompt = jnp.zeros((3, 6), jnp.int32)
    mask = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1]])
    prompt = prompt.at[jnp.nonzero(mask)].set(x[:, :4].reshape(-1)) + 5 * (1 - mask)
    cache = empty_cache(model.config, 3, 12, jnp.float32)
    apply = compiled(model)
    y, cache = apply({"params": params}, prompt, positions_of(mask), cache=cache)
    assert largest_difference(y[jnp.nonzero(mask)].reshape(3, 4, -1), whole[:, :4]) < 1e-5
    for start, end in ((4, 7), (7, 8), (8, 9)):
        positions = jnp.broadcast_to(jnp.arange(start, end), (3, end - start))
        y, cache = apply({"params": params}, x[:, start:end], positions, cache=cache)
        assert largest_difference(y, whole[:, start:end]) < 1e-5
    assert int(cache.used) == 11 and cache.positions[:, -1].tolist() == [-1] * 3


@pytest.mark.parametrize("variant", ["window", "windows"])
def test_a_window_hides_what_lies_before_it(variant):
    """Closed form of the reach: a change at position 2 is felt up to 2 + sum of (window - 1), and no further."""
    model, params = tiny_decoder(**VARIANTS[variant])
    changes = VARIANTS[variant]["windows"]
    x = tokens(1, 12)
    felt = jnp.abs(logits(model, params, x.at[0, 2].set((x[0, 2] + 1) % 31)) - logits(model, params, x)).max(-1)[0] > 0
    reach = 11 if 0 in changes else 2 + sum(window - 1 for window in changes)
    assert felt.tolist() == [2 <= p <= reach for p in range(12)]


def test_windows_count_positions_inside_a_segment():
    model, params = tiny_decoder(windows=(3, 3, 3))
    a, b = tokens(1, 5, seed=1), tokens(1, 6, seed=2)
    segments, positions = jnp.array([[1] * 5 + [2] * 6]), jnp.array([[*range(5), *range(6)]])
    y = logits(model, params, jnp.concatenate([a, b], axis=1), positions, segments)
    assert largest_difference(y[:, 5:], logits(model, params, b)) < 1e-5


def test_rows_of_a_cache_can_be_mapped():
    """Each row alone under ``vmap``, with the axes that ``Cache`` names, is each row in the batch."""
    model, params = tiny_decoder()
    axes = Cache(1, 1, 0, None)
    cache = empty_cache(model.config, 3, 8, jnp.float32)
    x, positions = tokens(3, 4), positions_of(jnp.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]]))
    at = jnp.array([[3], [3], [2]])
    run = lambda x, positions, cache, at: model.apply({"params": params}, x, positions, cache=cache, logit_positions=at)

    def one(x, positions, cache, at):
        alone = Cache(cache.k[:, None], cache.v[:, None], cache.positions[None], cache.used)
        y, new = run(x[None], positions[None], alone, at[None])
        return y[0], Cache(new.k[:, 0], new.v[:, 0], new.positions[0], new.used)

    mapped, filled = jit(jax.vmap(one, in_axes=(0, 0, axes, 0), out_axes=(0, axes)))(x, positions, cache, at)
    whole, expected = jit(run)(x, positions, cache, at)
    assert mapped.shape == (3, 1, 31) and largest_difference(mapped, whole) < 1e-5
    assert largest_difference(filled, expected) < 1e-5


def test_logits_where_they_are_asked_for():
    model, params = tiny_decoder()
    x, at = tokens(2, 6), jnp.array([[5, 0], [2, 2]])
    some = logits(model, params, x, logit_positions=at)
    assert largest_difference(some, jnp.take_along_axis(logits(model, params, x), at[..., None], axis=1)) < 1e-6


def test_a_cache_needs_positions_and_takes_no_segments():
    model, params = tiny_decoder()
    cache = empty_cache(model.config, 2, 8, jnp.float32)
    for more in ({}, {"positions": jnp.zeros((2, 7), jnp.int32), "segment_ids": jnp.ones((2, 7), jnp.int32)}):
        with pytest.raises(InputError, match="give positions"):
            logits(model, params, tokens(), cache=cache, **more)


def test_a_tied_head_computes_in_the_model_s_dtype():
    """An embedding that is kept wider than the model, as a trained copy is, changes nothing but its own precision."""
    model, params = tiny_decoder(dtype=jnp.bfloat16, tie_word_embeddings=True)
    wider = jax.tree.map(lambda p: p.astype(jnp.float32), params["model"]["embed_tokens"])
    changed = {"model": {**params["model"], "embed_tokens": wider}}
    assert np.array_equal(*(model.apply({"params": p}, tokens()) for p in (changed, params)))


def test_layers_are_scanned():
    """Compile time does not grow with depth: the program of 12 layers is as long as that of 3."""
    length = []
    for layers in (3, 12):
        model, params = tiny_decoder(num_hidden_layers=layers)
        length.append(jax.jit(model.apply).lower({"params": params}, tokens()).as_text().count("\n"))
    assert length[0] == length[1]


def test_rotation_is_relative():
    """Scores depend on the difference of positions only, and position 0 is no rotation."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    turned = lambda x, i: rotate(x, angles(jnp.array([[i]]), Rope(), 8, jnp.float32))
    score = lambda i, j: (turned(q, i) * turned(k, j)).sum()
    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert np.array_equal(turned(q, 0), q)


def test_frequencies_of_llama3_keep_short_and_divide_long_wavelengths():
    rope, plain = ROPE_LLAMA3, frequencies(Rope(ROPE_LLAMA3.theta), 32)
    ratio = frequencies(rope, 32) / plain
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 16 / 4], 1)
    np.testing.assert_allclose(ratio[wavelength > 16 / 1], 1 / 8)
    assert (np.diff(ratio) <= 0).all() and ((ratio > 0.13) & (ratio < 0.99)).any()


def test_stories260k_writes_english(shared):
    """Greedy decoding by recomputing; the words must be real ones."""
    model, params = load_pretrained(shared("models/stories260K"))
    ids = model.tokenizer("Once upon a time").input_ids
    buffer = np.zeros((1, 96), np.int32)
    buffer[0, : len(ids)] = ids
    step = jax.jit(lambda p, t, n: model.apply({"params": p}, t)[0, n - 1].argmax())
    for n in range(len(ids), 96):
        buffer[0, n] = step(params, buffer, n)
    text = model.tokenizer.decode(buffer[0], skip_special_tokens=True)
    words = [word.strip(".,!?\"'").lower() for word in text.split()]
    common = set(
        "the a was and to he she it they her his in of girl boy named little day with play very park loved".split()
    )
    assert len(words) > 30 and sum(word in common for word in words) > len(words) / 3, text
