"""Cross-entropy against float64 transcriptions: of whole logits, and of chunks with their gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stablelora_jax.training.cross_entropy import (
    chunk_length,
    chunked_cross_entropy,
    join_chunks,
    split_chunks,
    token_log_probs,
    token_scores,
)
from stablelora_jax.training.flops import dots
from tests.helpers import jit
from tests.training.oracles import masked_cross_entropy


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


def head(trained, frozen, x, number):
    """A dense head with a pair on it; what is trained may hold the kernel too."""
    kernel = trained.get("kernel", frozen["kernel"])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    z = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=wide)
    return z + (x @ trained["a"].astype(x.dtype) @ trained["b"].astype(x.dtype)).astype(wide) if "a" in trained else z


def drawn(B=3, K=7, D=5, V=11, dtype=jnp.float32, seed=0):
    """``(kernel, x, targets, weights)``; a row of weight 0, and x where the weight is 0 is not small."""
    rng = np.random.default_rng(seed)
    kernel, x = rng.normal(size=(D, V)), rng.normal(size=(B, K, D))
    weights = rng.integers(0, 2, (B, K))
    weights[0], weights[-1, -1] = 0, 1
    return jnp.asarray(kernel, dtype), jnp.asarray(x, dtype), jnp.asarray(rng.integers(0, V, (B, K))), weights


def by_hand(kernel, x, targets, weights):
    """Loss and its gradients for kernel and x in float64: ``softmax - one-hot``, written plainly."""
    kernel, x, targets = np.float64(kernel), np.float64(x), np.asarray(targets)
    z = x @ kernel
    powers = np.exp(z - z.max(-1, keepdims=True))
    p = powers / powers.sum(-1, keepdims=True)
    right = np.eye(kernel.shape[1])[targets]
    loss = -(np.log((p * right).sum(-1)) * weights).sum()
    dz = (p - right) * np.asarray(weights)[..., None]
    return loss, np.einsum("bkd,bkv->dv", x, dz), dz @ kernel.T


CHUNKS = [(3, 7, 1), (3, 7, 3), (3, 7, 7), (3, 7, 50), (1, 1, 1), (2, 1, 4), (1, 8, 2)]


@pytest.mark.parametrize("B,K,chunk", CHUNKS)
def test_chunks_give_the_loss_and_its_gradient(B, K, chunk):
    kernel, x, targets, weights = map(jnp.asarray, drawn(B, K))
    loss = lambda x: 3 * chunked_cross_entropy(head, {}, {"kernel": kernel}, x, targets, weights, chunk)
    value, gradient = jit(jax.value_and_grad(loss))(x)
    expected, _, dx = by_hand(kernel, x, targets, weights)
    assert value.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, 3 * dx, rtol=1e-5, atol=1e-6)
    assert (np.asarray(gradient)[np.asarray(weights) == 0] == 0).all()
    np.testing.assert_allclose(jit(loss)(x), value, rtol=1e-6)


def test_chunks_are_masked_cross_entropy():
    """The definition: K = T places that read one token further left."""
    kernel, x, tokens, mask = drawn()
    total, _ = masked_cross_entropy(x @ kernel, tokens, mask)
    at = (np.arange(7) + 1) % 7
    weights = mask[:, at] * (at > 0)
    np.testing.assert_allclose(
        chunked_cross_entropy(head, {}, {"kernel": kernel}, x, tokens[:, at], jnp.asarray(weights), 2), total, rtol=1e-6
    )


@pytest.mark.parametrize("pair", [False, True])
def test_a_trained_head_has_the_gradient_of_the_plain_loss(pair, x64):
    kernel, x, targets, weights = drawn(dtype=jnp.float64)
    rng = np.random.default_rng(1)
    trained = {"a": rng.normal(size=(5, 2)), "b": rng.normal(size=(2, 11))} if pair else {"kernel": kernel + 1}
    trained = jax.tree.map(jnp.asarray, trained)

    def plain(trained, x):
        z = head(trained, {"kernel": kernel}, x, None)
        return -(jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0] * weights).sum()

    def tiled(trained, x):
        return chunked_cross_entropy(
            head, trained, {"kernel": kernel}, x, jnp.asarray(targets), jnp.asarray(weights), 3
        )

    (value, found), (total, expected) = (jax.value_and_grad(f, (0, 1))(trained, x) for f in (tiled, plain))
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, total, rtol=1e-12)
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)
    if not pair:
        loss, gradient, dx = by_hand(trained["kernel"], x, targets, weights)
        np.testing.assert_allclose(value, loss, rtol=1e-12)
        chex.assert_trees_all_close(found, ({"kernel": gradient}, dx), rtol=1e-12, atol=1e-12)


def test_a_frozen_head_has_no_gradient():
    kernel, x, targets, weights = drawn()
    loss = lambda kernel: chunked_cross_entropy(
        head, {}, {"kernel": kernel}, x, jnp.asarray(targets), jnp.asarray(weights), 3
    )
    assert (np.asarray(jax.grad(loss)(kernel)) == 0).all()


def test_bfloat16_sums_in_float32_and_is_the_gradient_of_its_inputs():
    kernel, x, targets, weights = drawn(dtype=jnp.bfloat16)
    trained = {"kernel": kernel.astype(jnp.float32)}  # a float32 master, as an adapter has it
    loss = lambda trained, x: chunked_cross_entropy(
        head, trained, {"kernel": kernel}, x, jnp.asarray(targets), jnp.asarray(weights), 3
    )
    value, (found, dx) = jax.value_and_grad(loss, (0, 1))(trained, x)
    expected, gradient, wanted = by_hand(kernel, x, targets, weights)
    assert (value.dtype, dx.dtype, found["kernel"].dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(np.float64(dx), wanted, rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(found["kernel"], gradient, rtol=2**-7, atol=2**-7)


def test_chunks_of_huge_logits_stay_finite():
    kernel, x, targets, weights = drawn()
    loss = lambda x: chunked_cross_entropy(
        head, {}, {"kernel": 1e4 * kernel}, x, jnp.asarray(targets), jnp.asarray(weights), 3
    )
    value, dx = jax.value_and_grad(loss)(x)
    assert np.isfinite(value) and value > 1e4 and np.isfinite(dx).all() and np.abs(dx).max() > 0


def test_chunks_inside_a_scan_and_a_checkpoint():
    kernel, x, targets, weights = drawn()
    one = lambda x, scale: (
        scale * chunked_cross_entropy(head, {}, {"kernel": kernel}, x, jnp.asarray(targets), jnp.asarray(weights), 3)
    )
    add = lambda total, scale: (total + jax.checkpoint(one)(x * scale, scale), None)
    scales = jnp.array([0.5, 2.0])
    value, found = jax.value_and_grad(lambda scales: jax.lax.scan(add, 0.0, scales)[0])(scales)
    each = [by_hand(kernel, x * s, targets, weights) for s in (0.5, 2.0)]
    np.testing.assert_allclose(value, 0.5 * each[0][0] + 2 * each[1][0], rtol=1e-6)
    slopes = [loss + s * (dx * np.float64(x)).sum() for s, (loss, _, dx) in zip((0.5, 2.0), each, strict=True)]
    np.testing.assert_allclose(found, slopes, rtol=1e-5)


def test_the_head_is_multiplied_twice_and_without_a_gradient_once():
    kernel, x, targets, weights = drawn(K=6)
    loss = lambda x: chunked_cross_entropy(
        head, {}, {"kernel": kernel}, x, jnp.asarray(targets), jnp.asarray(weights), 2
    )
    one = 2 * 3 * 6 * 5 * 11
    assert dots(jax.make_jaxpr(loss)(x)) == one
    assert dots(jax.make_jaxpr(jax.grad(loss))(x)) == 2 * one


@pytest.mark.parametrize("rows,length,chunk", CHUNKS)
def test_chunks_are_cut_and_joined(rows, length, chunk):
    x = np.arange(rows * length * 2).reshape(rows, length, 2) + 1
    cut = split_chunks(jnp.asarray(x), chunk)
    assert cut.shape == (-(-length // chunk), rows, chunk, 2) and np.array_equal(join_chunks(cut, length), x)
    assert int(cut.sum()) == x.sum(), "the rest is zeros"


@given(st.integers(1, 300), st.integers(1, 9000), st.integers(2, 300_000), st.integers(0, 9000))
def test_chunks_are_alike_and_an_eighth_or_64_mib_at_most(rows, length, vocabulary, others):
    whole = length + others
    chunk = chunk_length(rows, length, vocabulary, whole)
    assert others or chunk == chunk_length(rows, length, vocabulary)
    count = -(-length // chunk)
    fits = lambda chunk: 4 * rows * chunk * vocabulary <= 2**26 and 8 * chunk <= whole
    assert chunk == 1 or fits(chunk)
    assert count == 1 or not fits(-(-length // (count - 1))), "as few as may be"
    assert 0 <= count * chunk - length < count, "and less than a token of each is filled up"


@pytest.mark.parametrize("parts", [1, 2])
def test_scores_are_those_of_all_logits(parts):
    kernel, x, targets, _ = drawn(4, 9)
    scores, likeliest = jit(lambda x: token_scores(lambda x: x @ kernel, x, targets, parts=parts))(x)
    z = np.float64(x @ kernel)
    chosen = np.take_along_axis(z, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores, chosen - np.log(np.exp(z).sum(-1)), rtol=1e-5)
    assert np.array_equal(likeliest, z.argmax(-1) == targets) and scores.shape == (4, 9)
