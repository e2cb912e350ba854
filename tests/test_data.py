"""Tokenising, padding and the order of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelora_jax import InputError, base_directory
from stablelora_jax.data import Example, bucket, encode, make_batch, rows_of_step, training_examples
from stablelora_jax.tasks.question import Question


@pytest.fixture(scope="module")
def tokenizer():
    from stablelora_jax.models.tokenizer import load_tokenizer

    return load_tokenizer(base_directory())


def test_an_example_is_the_whole_text_and_the_answer_its_end(tokenizer):
    example = encode(tokenizer, "The cat is", " bigger than the mouse.", end=True, length=64)
    assert tokenizer.decode(example.tokens[: example.answer], skip_special_tokens=True) == "The cat is"
    assert tokenizer.decode(example.tokens[example.answer : -1]) == " bigger than the mouse."
    assert example.tokens[-1] == tokenizer.eos_token_id and example.cut == 0
    without = encode(tokenizer, "The cat is", " bigger than the mouse.", end=False, length=64)
    assert without.tokens == example.tokens[:-1]


def test_a_prompt_is_tokenised_with_its_answer(shared):
    """SentencePiece puts a space before a text of its own: an answer tokenised alone would hold two."""
    from stablelora_jax.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared("models/stories260K"))
    example = encode(tokenizer, "Lily saw a", " big dog", end=True, length=64)
    assert list(example.tokens) == [*tokenizer("Lily saw a big dog").input_ids, tokenizer.eos_token_id]
    assert example.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(example.tokens[: example.answer], skip_special_tokens=True) == "Lily saw a"


def test_long_texts_lose_their_beginning(tokenizer):
    whole = encode(tokenizer, "one two three four five six seven", " eight", end=True, length=64)
    cut = encode(tokenizer, "one two three four five six seven", " eight", end=True, length=len(whole.tokens) - 3)
    assert cut.tokens == whole.tokens[3:] and cut.answer == whole.answer - 3 and cut.cut == 3
    with pytest.raises(InputError, match="does not fit into length=2"):
        encode(tokenizer, "one", " two three four five six", end=True, length=2)


def test_training_examples_hold_the_right_answer(tokenizer):
    question = Question("Question: which?\nAnswer:", (" cow", " dog"), 1, "x")
    (example,) = training_examples(tokenizer, [question], 64)
    assert tokenizer.decode(example.tokens[example.answer : -1]) == " dog"


def test_a_batch_is_padded_and_masked_by_length():
    batch = make_batch([Example((5, 6, 7), 1), Example((8, 0), 1)], rows=3)
    assert batch.tokens.shape == (3, 32) and {field.dtype for field in batch} == {np.dtype(np.int32)}
    assert batch.tokens[:, :4].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.loss_mask[:, :4].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.segment_ids[:, :4].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert (batch.positions == np.arange(32)).all()


@given(st.integers(1, 5000))
def test_buckets_are_few_and_waste_at_most_half(length):
    assert length <= bucket(length) <= max(32, length * 1.5 + 1)
    assert bucket(length) in {32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144}


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 5))
def test_every_epoch_holds_every_row_once(batch_size, count, seed):
    rows = [row for step in range(3 * count) for row in rows_of_step(step, batch_size, count, seed)]
    epochs = [rows[i : i + count] for i in range(0, len(rows) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert rows_of_step(2, batch_size, count, seed) == rows[2 * batch_size : 3 * batch_size]


def test_epochs_and_seeds_differ():
    order = lambda step, seed: rows_of_step(step, 50, 50, seed)
    assert order(0, 0) != order(1, 0) and order(0, 0) != order(0, 1) and order(0, 0) == order(0, 0)
