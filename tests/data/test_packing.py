"""Packing: first-fit beside its definition, and packed rows that are the same as texts on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters
from stablelora_jax.data import Example, first_fit, pack, plan_of
from tests.helpers import jit, largest_difference, tiny_decoder, trained
from tests.training.oracles import masked_cross_entropy

SPEC = LoraSpec(target_modules="all-linear", rank=2)


def plainly(lengths, room):
    """First-fit as its name says, in quadratic time."""
    rows, where = [], []
    for n in lengths:
        row = next((i for i, used in enumerate(rows) if used + n <= room), len(rows))
        if row == len(rows):
            rows.append(0)
        rows[row] += n
        where.append(row)
    return where


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), min_size=1))))
def test_first_fit_is_what_it_says(given):
    room, lengths = given
    row_of = first_fit(lengths, room)
    assert row_of.dtype == np.int32 and row_of.tolist() == plainly(lengths, room) == first_fit(lengths, room).tolist()
    texts, starts = plan_of(row_of)
    assert sorted(texts.tolist()) == list(range(len(lengths))) and starts[-1] == len(lengths)
    rows = [texts[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]
    assert all(row and row == sorted(row) and sum(lengths[i] for i in row) <= room for row in rows)
    assert all(row_of[i] == number for number, row in enumerate(rows) for i in row)


def test_a_text_longer_than_a_row_is_refused():
    with pytest.raises(InputError, match="a text of 9 tokens does not fit into a row of 8"):
        first_fit([3, 9], 8)


def texts(lengths=(5, 9, 3, 12, 2, 7), seed=0):
    rng = np.random.default_rng(seed)
    return [Example(tuple(map(int, rng.integers(0, 31, n))), int(rng.integers(0, n - 1))) for n in lengths]


def packed(examples, room=16):
    order, starts = plan_of(first_fit([len(e.tokens) for e in examples], room))
    return pack([[examples[i] for i in order[a:b]] for a, b in zip(starts, starts[1:], strict=False)], room)


def test_a_packed_row_by_hand():
    batch = pack([[Example((5, 6, 7, 8), 1, mask=(1, 1, 0, 1)), Example((8, 9, 1), 1, mask=(0, 1, 0))]], 8)
    assert batch.loss_mask.tolist() == [[0, 1, 0, 1, 0, 1, 0, 0]]
    batch = pack([[Example((5, 6, 7), 0), Example((8, 9), 1)], [Example((1,), 0)]], 7)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0] * 7]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0, 1, 0, 0], [0] * 7], "nothing predicts a text's first token"
    assert {field.dtype for field in batch[:4]} == {np.dtype(np.int32)} and batch.loss_positions is None


def test_learnt_places_of_a_packed_row():
    """Those of all its texts, and never a text's first token."""
    rows = [[Example((5, 6, 7), 0), Example((8, 9), 1)], [Example((1,), 0)]]
    batch = pack(rows, 7, max_loss_tokens=4)
    assert batch.loss_positions.tolist() == [[1, 2, 4, 0], [0] * 4] and batch.loss_positions.dtype == np.int32
    assert [x.tolist() for x in batch[:4]] == [x.tolist() for x in pack(rows, 7)[:4]]
    with pytest.raises(InputError, match="a row has 3 loss tokens, more than 2"):
        pack(rows, 7, max_loss_tokens=2)


def test_packed_loss_and_gradients_are_the_sum_over_the_texts(x64):
    model, params = tiny_decoder(jnp.float64)
    start = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    start = jax.tree.map(lambda x: x.astype(jnp.float64), start)
    lora, examples = adapted(model, SPEC), texts()
    batch = packed(examples)
    assert batch.tokens.shape[0] == 3 and batch.segment_ids.max() == 3

    def loss(adapters, tokens, mask, *where):
        logits = lora.apply({"params": params, "lora": adapters}, tokens, *where)
        return masked_cross_entropy(logits, tokens, mask)

    together = jit(jax.value_and_grad(loss, has_aux=True))
    inputs = (batch.tokens, batch.loss_mask, batch.positions, batch.segment_ids)
    (total, count), grads = together(start, *inputs)
    alone = []
    for example in examples:  # padded at the end, where causality hides it, to be one compilation
        n, row = len(example.tokens), np.zeros((2, 1, 12), np.int32)
        row[0, 0, :n], row[1, 0, example.answer : n] = example.tokens, 1
        alone.append(together(start, *row))
    assert count == sum(c for (_, c), _ in alone) > 0
    np.testing.assert_allclose(total / count, sum(t for (t, _), _ in alone) / count, rtol=1e-9)
    expected = jax.tree.map(lambda *g: sum(g) / count, *[g for _, g in alone])
    assert largest_difference(jax.tree.map(lambda g: g / count, grads), expected) < 1e-9
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(expected)) > 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"windows": (4, 4, 4)}, {"windows": (0, 3, 5)}], ids=["full", "window", "mixed"]
)
def test_a_text_never_sees_the_one_before_it(changes):
    model, params = tiny_decoder(**changes)
    apply = jax.jit(lambda b: model.apply({"params": params}, b.tokens, b.positions, b.segment_ids))
    first, second, third = texts((6, 7, 3))
    other = first._replace(tokens=tuple((t + 1) % 31 for t in first.tokens))
    one, two = (np.asarray(apply(pack([[e, second, third]], 16))) for e in (first, other))
    assert one[:, 6:16].tobytes() == two[:, 6:16].tobytes() and (one[:, :6] != two[:, :6]).any()
