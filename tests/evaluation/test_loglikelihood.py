"""Log-likelihoods against a plain softmax over all logits; tokenising, cutting and windows against their rules."""

import jax
import numpy as np
import pytest

from stablelora_jax import InputError, base_directory, load_pretrained
from stablelora_jax.evaluation.loglikelihood import (
    Request,
    encode,
    encode_pair,
    likelihoods,
    make_compute,
    prefix_token,
    rolling,
)
from stablelora_jax.models.pretrained.tokenizer import load_tokenizer
from stablelora_jax.parallel import pmap_layout
from tests.helpers import tiny_decoder


@pytest.fixture(scope="module")
def tiny():
    model, params = tiny_decoder()
    layout = pmap_layout()
    inner, placed = make_compute(model, layout), layout.place_base(params)
    return model, params, lambda rows: inner(placed, {}, rows)


def plain(model, params, read, k):
    """Float64 log-softmax at the last k places of one text, and the logits there."""
    padded = np.array([[*read, *[0] * (64 - len(read))]])
    logits = np.float64(jax.jit(model.apply)({"params": params}, padded)[0])[len(read) - k : len(read)]
    return np.float64(jax.nn.log_softmax(logits, axis=-1)), logits


def test_totals_and_greedy(tiny):
    model, params, compute = tiny
    rng = np.random.default_rng(0)
    requests = [
        Request(tuple(rng.integers(1, 31, n).tolist()), tuple(rng.integers(1, 31, k).tolist()))
        for n, k in [(1, 1), (3, 2), (5, 20), (40, 1), (2, 33), (7, 4)]
    ]
    context = (4, 9, 2)  # and one whose continuation is the model's own choice
    own: tuple[int, ...] = ()
    for _ in range(2):
        own += (int(plain(model, params, context + own, 1)[1].argmax()),)
    requests += [Request(context, own), requests[1]]
    found = likelihoods(compute, requests, rows=8, max_length=64)
    for (before, after), one in zip(requests, found, strict=True):
        log_probs, logits = plain(model, params, (before + after)[:-1], len(after))
        assert one.total == pytest.approx(log_probs[np.arange(len(after)), after].sum(), abs=1e-5 * len(after))
        assert one.greedy == (logits.argmax(-1) == after).all()
    assert found[6].greedy and found[7] == found[1]


def test_a_long_text_loses_its_beginning(tiny):
    model, params, compute = tiny
    before, after = tuple(range(1, 20)), (3, 4, 5)
    (one,) = likelihoods(compute, [Request(before, after)], rows=8, max_length=10)
    read = (before + after)[-11:-1]
    assert len(read) == 10
    log_probs, _ = plain(model, params, read, 3)
    assert one.total == pytest.approx(log_probs[np.arange(3), after].sum(), abs=1e-5)
    for bad in (Request((), (1,)), Request((1,), ()), Request((1,), tuple(range(11)))):
        with pytest.raises(InputError, match="cannot be scored in 10"):
            likelihoods(compute, [bad], rows=8, max_length=10)


def test_equal_requests_are_computed_once():
    seen = []

    def compute(rows):
        seen.append(rows)
        return np.arange(8.0), np.zeros(8, bool)

    found = likelihoods(
        compute, [Request((1,), (2,)), Request((1,), (3, 4)), Request((1,), (2,))], rows=8, max_length=32
    )
    assert len(seen) == 1 and int(seen[0].mask.sum()) == 3
    assert found[0] == found[2] != found[1]


def test_one_shape_for_a_length():
    shapes = set()

    def compute(rows):
        shapes.add((rows.tokens.shape, rows.logit_positions.shape))
        return np.zeros(4), np.zeros(4, bool)

    requests = [Request((1,) * (n - k), (2,) * k) for n in range(5, 100) for k in (1, n // 2)]
    likelihoods(compute, requests, rows=4, max_length=128)
    lengths = [tokens[1] for tokens, _ in shapes]
    assert sorted(lengths) == sorted(set(lengths)) and len(lengths) <= 5
    assert all(at[1] <= tokens[1] for tokens, at in shapes)


@pytest.mark.parametrize("name", ["base", "stories260K"])
def test_pairs(name, shared):
    tokenizer = load_tokenizer(base_directory() if name == "base" else shared(f"models/{name}"))
    start = tuple(tokenizer("").input_ids)
    ids = lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids)
    whole = start + ids("The bear is big")
    context, after = encode_pair(tokenizer, "The bear", " is big")
    assert context + after == whole and context == start + ids("The bear")
    assert encode_pair(tokenizer, "The bear ", "is big") == (context, after)
    assert encode_pair(tokenizer, "", "The bear") == ((prefix_token(tokenizer),), ids("The bear"))
    written = tokenizer.decode([prefix_token(tokenizer)]) + "The bear"
    assert encode(tokenizer, written) == ids(written)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 20, 21, 37])
def test_windows_predict_each_token_once(count):
    tokens = list(range(100, 100 + count))
    windows = rolling(tokens, 7, 10)
    assert [t for one in windows for t in one.continuation] == tokens
    assert windows[0].context == (7,)
    for one in windows[1:]:
        first = one.continuation[0] - 100
        assert list(one.context) == tokens[first - len(one.context) : first]
        assert len(one.context) + len(one.continuation) == 11, "the window that is read is full"
    assert rolling([], 7, 10) == []


def test_the_base_of_the_package_has_a_prefix():
    assert prefix_token(load_pretrained(base_directory())[0].tokenizer) >= 0
