"""Tokenising, padding and the order of rows."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelora_jax import InputError, base_directory
from stablelora_jax.data import (
    Example,
    Text,
    TokenStore,
    batch_of_step,
    bucket,
    encode,
    first_fit,
    make_batch,
    make_loader,
    most_segments,
    order,
    place_of_step,
    rows_of_step,
    templated,
    training_texts,
)
from stablelora_jax.data.batch import positions_of_mask
from stablelora_jax.data.conversation import Conversation
from stablelora_jax.data.encoding import encode_many
from stablelora_jax.data.tasks.question import Problem, Question


@pytest.fixture(scope="module")
def tokenizer():
    from stablelora_jax.models.pretrained.tokenizer import load_tokenizer

    return load_tokenizer(base_directory())


def test_an_example_is_the_whole_text_and_the_answer_its_end(tokenizer):
    example = encode(tokenizer, "The cat is", " bigger than the mouse.", end=True, max_length=64)
    assert tokenizer.decode(example.tokens[: example.answer], skip_special_tokens=True) == "The cat is"
    assert tokenizer.decode(example.tokens[example.answer : -1]) == " bigger than the mouse."
    assert example.tokens[-1] == tokenizer.eos_token_id and example.cut == 0
    without = encode(tokenizer, "The cat is", " bigger than the mouse.", end=False, max_length=64)
    assert without.tokens == example.tokens[:-1]


def test_a_prompt_is_tokenised_with_its_answer(shared):
    """SentencePiece puts a space before a text of its own: an answer tokenised alone would hold two."""
    from stablelora_jax.models.pretrained.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared("models/stories260K"))
    example = encode(tokenizer, "Lily saw a", " big dog", end=True, max_length=64)
    assert list(example.tokens) == [*tokenizer("Lily saw a big dog").input_ids, tokenizer.eos_token_id]
    assert example.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(example.tokens[: example.answer], skip_special_tokens=True) == "Lily saw a"


def test_long_texts_lose_their_beginning(tokenizer):
    whole = encode(tokenizer, "one two three four five six seven", " eight", end=True, max_length=64)
    cut = encode(tokenizer, "one two three four five six seven", " eight", end=True, max_length=len(whole.tokens) - 3)
    assert cut.tokens == whole.tokens[3:] and cut.answer == whole.answer - 3 and cut.cut == 3
    with pytest.raises(InputError, match="does not fit into max_length=2"):
        encode(tokenizer, "one", " two three four five six", end=True, max_length=2)


def test_training_texts_hold_the_right_answer(tokenizer):
    question = Question("Question: which?\nAnswer:", (" cow", " dog"), 1, "x")
    (text,) = training_texts([question])
    example = encode(tokenizer, text.prompt, text.answer, end=True, max_length=64)
    assert tokenizer.decode(example.tokens[example.answer : -1]) == " dog"


def test_a_batch_is_padded_and_masked_by_length():
    batch = make_batch([Example((5, 6, 7), 1), Example((8, 0), 1)], rows=3)
    assert batch.tokens.shape == (3, 32) and {field.dtype for field in batch[:4]} == {np.dtype(np.int32)}
    assert batch.loss_positions is None
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


def test_a_long_text_is_cut_on_the_side_that_is_said_or_refused(tokenizer):
    given = dict(prompt="one two three", answer=" four five six", end=True)
    whole = encode(tokenizer, **given, max_length=64)
    n = len(whole.tokens)
    left, right = (encode(tokenizer, **given, max_length=n - 2, truncate=side) for side in ("left", "right"))
    assert (left.tokens, left.answer, left.cut) == (whole.tokens[2:], whole.answer - 2, 2)
    assert (right.tokens, right.answer, right.cut) == (whole.tokens[:-2], whole.answer, 2)
    assert encode(tokenizer, **given, max_length=n, truncate="error") == whole
    with pytest.raises(
        InputError, match=f"has {n} tokens, more than max_length={n - 1}: raise max_length, or set data.trunc"
    ):
        encode(tokenizer, **given, max_length=n - 1, truncate="error")
    with pytest.raises(InputError, match="does not fit"):
        encode(tokenizer, **given, max_length=whole.answer, truncate="right")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_template_makes_the_prompt_a_users_turn(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    (text,) = templated(chat, [Text("Who?", " The cat. ", "x")])
    assert text == Text("<s><user>Who?</s><assistant>", "The cat.", "x")
    (example,) = encode_many(chat, [Text("Who?", " The cat.", "x")], end=True, max_length=64, chat=True)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The cat."}]
    assert example.tokens == chat.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert chat.decode(example.tokens[example.answer :]) == "The cat.</s>"
    with pytest.raises(InputError, match="no chat template: set data.chat_template to false"):
        templated(tokenizer, [Text("Who?", " The cat.", "x")])


def test_a_chat_is_learnt_as_it_is_served(tokenizer):
    from stablelora_jax.generation.generate import encode_prompts

    model = copy.deepcopy(tokenizer)
    model.chat_template = (
        "{% if messages[0].role != 'system' %}<system>You are helpful.{{ eos_token }}{% endif %}" + TEMPLATE
    )
    for turns in (
        ({"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Who?\n"}),
        ({"role": "user", "content": "Who?"},),
    ):
        chat = Conversation((*turns, {"role": "assistant", "content": "The cat."}))
        text = Text("no\n\nsuch prompt", "no such answer", "x", chat)
        (example,) = encode_many(model, [text], end=True, max_length=200, chat=True)
        (served,) = encode_prompts(model, [list(turns)])
        assert list(example.tokens[: example.answer]) == served
        said = model.decode(example.tokens)
        assert said.count("You are helpful.") == (len(turns) == 1), "the template's system only where there is none"
        assert "no such" not in said and model.decode(example.tokens[example.answer :]) == "The cat.</s>"
    plain = encode_many(
        model, [text._replace(prompt="a\n\nb", answer=" The cat.")], end=True, max_length=200, chat=False
    )
    assert model.decode(next(plain).tokens).endswith("a\n\nb The cat.</s>")


def test_texts_are_right_answers_with_their_ids():
    asked, told = Question("Q", (" a", " b"), 1, "q-1"), Problem("P", " x", None, "p-1")
    assert training_texts([asked, told]) == [Text("Q", " b", "q-1"), Text("P", " x", "p-1")]


def loader(batching, count=37, batch_size=8):
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 48, count).astype(np.int32)
    tokens = rng.integers(0, 99, lengths.sum()).astype(np.int32)
    answers, rows = rng.integers(0, lengths).astype(np.int32), first_fit(lengths, 48)
    store = TokenStore(tokens, lengths, answers, rows, np.cumsum(lengths), 0, "")
    return make_loader(store, batching=batching, max_length=48, batch_size=batch_size, seed=3)


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_any_step_on_any_number_of_hosts_is_the_same_global_batch(batching):
    """The state is the step: stopping anywhere and going on, with other hosts, gives bit-equal batches."""
    one = loader(batching)
    straight = [batch_of_step(one, step) for step in range(12)]
    for stop, hosts in ((1, 2), (5, 4), (11, 8)):
        order._epoch.cache_clear()
        resumed = loader(batching)
        for step in range(stop, 12):
            shares = [batch_of_step(resumed, step, slice(i * 8 // hosts, (i + 1) * 8 // hosts)) for i in range(hosts)]
            assert {share.tokens.shape[0] for share in shares} == {8 // hosts}
            for field, whole in zip(zip(*shares, strict=True), straight[step], strict=True):
                assert np.concatenate(field).tobytes() == whole.tobytes() and field[0].dtype == np.int32


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_an_epoch_of_batches_holds_every_text_once(batching):
    made = loader(batching, batch_size=1)
    batches = [batch_of_step(made, step) for step in range(made.rows)]
    seen = sorted(
        tuple(batch.tokens[0][batch.segment_ids[0] == s].tolist())
        for batch in batches
        for s in range(1, batch.segment_ids.max() + 1)
    )
    assert seen == sorted(tuple(made.store.example(i).tokens.tolist()) for i in range(37))
    assert {batch.tokens.shape for batch in batches} == ({(1, 48)} if batching == "pack" else {(1, 32), (1, 48)})


def test_a_place_is_epoch_and_row():
    assert place_of_step(0, 8, 37) == (0, 0) and place_of_step(5, 8, 37) == (1, 3)
    rows = rows_of_step(5, 8, 37, 0)
    assert rows == [row for step in range(37 * 2) for row in rows_of_step(step, 1, 37, 0)][37 + 3 : 37 + 11]


def places_by_hand(mask, most):
    """Row by row."""
    found = [[t for t, learnt in enumerate(row) if learnt] for row in mask]
    return [row + [0] * (most - len(row)) for row in found]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4), st.integers(1, 12), st.integers(0, 3), st.randoms(use_true_random=False))
def test_learnt_places_are_where_the_mask_is(rows, length, spare, random):
    mask = np.array([[random.randint(0, 1) for _ in range(length)] for _ in range(rows)], np.int32)
    mask = mask.reshape(rows, length)
    most = int(mask.sum(axis=1).max(initial=0)) + spare
    found, most = positions_of_mask(mask, most), max(1, most)  # the head reads a place at least
    assert found.dtype == np.int32 and found.shape == (rows, most) and found.tolist() == places_by_hand(mask, most)


def test_of_nothing_learnt_there_is_one_place():
    """0, which is never learnt."""
    np.testing.assert_array_equal(positions_of_mask(np.zeros((2, 3), np.int32), 0), [[0], [0]])


def test_more_learnt_places_than_room_are_refused():
    with pytest.raises(InputError, match="a row has 3 loss tokens, more than 2"):
        positions_of_mask(np.array([[0, 1, 1, 1], [0, 0, 1, 0]]), 2)


TEXTS = st.lists(st.integers(2, 48).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), min_size=1)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 5), st.sampled_from(["bucket", "pack"]))
def test_there_is_room_for_all_that_is_learnt_and_little_more(texts, batch_size, batching):
    """One K for each T, never too small (``positions_of_mask`` would raise), less than 16 above the need of a row."""
    lengths, answers = (np.array(column, np.int32) for column in zip(*texts, strict=True))
    tokens = np.arange(lengths.sum(), dtype=np.int32)
    store = TokenStore(tokens, lengths, answers, first_fit(lengths, 48), np.cumsum(lengths), 0, "")
    made = make_loader(store, batching=batching, max_length=48, batch_size=batch_size, seed=1)
    needed, learnt = {}, 0
    for step in range(made.rows):  # batch_size epochs
        batch = batch_of_step(made, step)
        rows, T = batch.tokens.shape
        assert batch.loss_positions.shape == (rows, made.max_loss_tokens[T]) and batch.loss_positions.dtype == np.int32
        assert batch.loss_positions.tolist() == places_by_hand(batch.loss_mask, made.max_loss_tokens[T])
        assert (batch.loss_mask[:, 0] == 0).all() and batch.segment_ids.max() <= most_segments(made)
        needed[T] = max(needed.get(T, 0), int(batch.loss_mask.sum(axis=1).max()))
        learnt += int((batch.loss_positions > 0).sum())
    assert learnt == batch_size * int((lengths - np.maximum(answers, 1)).sum())
    spare = made.max_loss_tokens[max(made.max_loss_tokens)] - max(
        needed.values()
    )  # a batch of this T may hold any of the texts
    assert 0 <= spare < 16 and set(needed) <= set(made.max_loss_tokens)
    assert all(K <= T and (K % 16 == 0 or K == T) for T, K in made.max_loss_tokens.items())


def test_a_text_that_is_learnt_whole_has_room():
    """Without a prompt and without a BOS token, the first token is nobody's to predict."""
    store = TokenStore(
        np.arange(17, dtype=np.int32), np.array([17]), np.array([0]), np.array([0]), np.array([17]), 0, ""
    )
    made = make_loader(store, batching="bucket", max_length=48, batch_size=2, seed=1)
    assert (
        made.max_loss_tokens == {32: 16} and batch_of_step(made, 0).loss_positions.tolist() == [list(range(1, 17))] * 2
    )
