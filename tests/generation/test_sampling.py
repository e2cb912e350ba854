"""The warpers against those of transformers, draws against their probabilities, and settings that make no sense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError
from stablelora_jax.generation.sampling import choose, row_keys, sampling, warp

SETTINGS = [
    (1.0, None, None),
    (0.3, None, None),
    (2.5, 5, None),
    (1.0, 1, None),
    (1.0, 10_000, None),
    (0.7, None, 0.9),
    (1.0, None, 0.05),
    (1.5, None, 1.0),
    (0.8, 7, 0.6),
    (1.3, 3, 0.999),
    (1.0, 2, 1e-6),
    (1.0, None, 1e-9),
]


def logits_with_ties():
    """Rows (4, 50): normal ones, peaked ones, many ties, all equal."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 50)).astype(np.float32) * np.array([[1.0], [8.0], [1.0], [0.0]], np.float32)
    rows[2] = np.round(rows[2])
    return rows


@pytest.mark.parametrize("case", SETTINGS, ids=str)
def test_warpers_are_those_of_transformers(case):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    temperature, top_k, top_p = case
    warpers = [transformers.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p and top_p < 1 else []
    logits = logits_with_ties()
    scores = torch.tensor(logits)
    for warper in warpers:
        scores = warper(torch.zeros((4, 1), dtype=torch.long), scores)
    ours = np.asarray(jax.jit(warp)(logits, sampling(temperature, top_k, top_p)))
    rows = slice(0, 2 if top_p and top_p < 1 else 4)  # which of several ties top-p keeps is torch.sort's affair
    assert np.array_equal(np.isfinite(ours)[rows], torch.isfinite(scores).numpy()[rows])
    assert np.array_equal(np.isfinite(ours).sum(1), torch.isfinite(scores).numpy().sum(1))
    ours = np.sort(np.asarray(jax.nn.softmax(ours, axis=-1)), axis=-1)
    np.testing.assert_allclose(ours, np.sort(torch.softmax(scores, -1).numpy(), axis=-1), atol=1e-6)


def test_settings_are_traced():
    compiled = jax.jit(lambda logits, settings: warp(logits, settings))
    for case in SETTINGS:
        compiled(logits_with_ties(), sampling(*case))
    assert compiled._cache_size() == 1


def test_draws_follow_the_probabilities():
    logits = jnp.asarray(np.log([[0.5, 0.3, 0.15, 0.05]] * 4000), jnp.float32)
    keys = row_keys(jax.random.key(0), jnp.arange(4000))
    drawn = np.asarray(choose(logits, sampling(1.0, 3, None), keys, jnp.int32(5)))
    shares = np.bincount(drawn, minlength=4) / 4000
    assert np.abs(shares - np.array([0.5, 0.3, 0.15, 0]) / 0.95).max() < 4 * np.sqrt(0.25 / 4000) and shares[3] == 0


def test_a_draw_depends_on_key_row_and_step_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 200)), jnp.float32)
    settings, key = sampling(1.0, None, None), jax.random.key(3)

    def draw(rows, step, key=key):
        rows = jnp.array(rows)
        return choose(logits[rows], settings, row_keys(key, rows), jnp.int32(step))

    whole = draw([0, 1, 2, 3, 4, 5], 7)
    assert np.array_equal(draw([4, 1], 7), whole[jnp.array([4, 1])])
    assert not np.array_equal(draw([0, 1, 2, 3, 4, 5], 8), whole)
    assert not np.array_equal(draw([0, 1, 2, 3, 4, 5], 7, jax.random.key(4)), whole)


def test_greedy_is_the_argmax():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, -1.0, 0.5]])
    assert sampling(0, None, None) is None
    assert choose(logits, None, row_keys(jax.random.key(0), jnp.arange(2)), jnp.int32(0)).tolist() == [1, 0]


@pytest.mark.parametrize(
    "case,message",
    [
        ((-1.0, None, None), "temperature must be 0"),
        ((float("nan"), None, None), "temperature must be 0"),
        ((float("inf"), None, None), "temperature must be 0"),
        ((1.0, 0, None), "top_k must be"),
        ((1.0, 2.5, None), "top_k must be"),
        ((1.0, None, 0.0), "top_p must be"),
        ((1.0, None, 1.1), "top_p must be"),
        ((0, 5, None), "give a temperature above 0"),
        ((0, None, 0.5), "give a temperature above 0"),
    ],
)
def test_bad_settings(case, message):
    with pytest.raises(InputError, match=message) as error:
        sampling(*case)
    assert "\n" not in str(error.value)
