"""Cross-entropy against a float64 transcription."""

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.losses import masked_cross_entropy, token_log_probs


def case(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(3, 5, 7)) * 4, rng.integers(0, 7, (3, 5))
    mask = rng.integers(0, 2, (3, 5))
    mask[1] = 0
    return jnp.asarray(logits, dtype), jnp.asarray(tokens), jnp.asarray(mask)


def transcribed(logits, tokens):
    expected = np.zeros(tokens.shape)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            z = np.float64(logits[b, t - 1])
            expected[b, t] = z[tokens[b, t]] - np.log(np.exp(z).sum())
    return expected


def test_log_probs():
    logits, tokens, _ = case()
    np.testing.assert_allclose(token_log_probs(logits, tokens), transcribed(logits, tokens), atol=1e-5)


def test_sum_and_count_use_the_mask_and_never_the_first_token():
    logits, tokens, mask = case()
    total, count = masked_cross_entropy(logits, tokens, mask)
    used = np.array(mask)
    used[:, 0] = 0
    assert used.sum() != np.array(mask).sum()
    np.testing.assert_allclose(total, -(transcribed(logits, tokens) * used).sum(), rtol=1e-5)
    assert count == used.sum()


def test_huge_logits_stay_finite():
    logits, tokens, mask = case()
    total, grads = jax.value_and_grad(lambda z: masked_cross_entropy(z, tokens, mask)[0])(logits * 1e4)
    assert np.isfinite(total) and np.isfinite(grads).all()


def test_float64_stays_float64(x64):
    logits, tokens, mask = case(jnp.float64)
    total, _ = masked_cross_entropy(logits, tokens, mask)
    used = np.array(mask)
    used[:, 0] = 0
    assert total.dtype == jnp.float64
    np.testing.assert_allclose(total, -(transcribed(logits, tokens) * used).sum(), rtol=1e-14)
