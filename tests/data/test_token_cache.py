"""Tokenised data on disk: what comes back is what was made, under a name that says everything that shapes it."""

import copy
import json

import numpy as np
import pytest

from stablelora_jax import InputError, base_directory
from stablelora_jax.data import (
    Text,
    batch_of_step,
    digest,
    encode,
    encode_chat,
    make_loader,
    statistics,
    tokenize_dataset,
)
from stablelora_jax.data import token_cache as module
from stablelora_jax.data.conversation import Conversation
from stablelora_jax.data.encoding import loss_mask
from stablelora_jax.data.token_cache import loss_counts
from stablelora_jax.models.pretrained.tokenizer import load_tokenizer

TEXTS = [Text(f"The cat number {i} is", " small" * (1 + i % 7), f"t-{i}") for i in range(50)]
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(base_directory())


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_hit_is_a_miss_is_memory(tokenizer, tmp_path, monkeypatch):
    memory = tokenize_dataset(tokenizer, TEXTS, max_length=16)
    miss = tokenize_dataset(tokenizer, TEXTS, max_length=16, cache=tmp_path)

    def refuse(*_, **__):
        raise AssertionError("tokenised again")
        yield

    monkeypatch.setattr(module, "encode_many", refuse)
    hit = tokenize_dataset(tokenizer, TEXTS, max_length=16, cache=tmp_path)
    assert same(memory, miss) and same(memory, hit) and isinstance(hit.tokens, np.memmap)
    assert [p.name for p in tmp_path.iterdir()] == [hit.digest]
    assert {a.dtype for a in (hit.tokens, hit.lengths, hit.answers, hit.rows)} == {np.dtype(np.int32)}
    for i in (0, 7, 49):
        alone = encode(tokenizer, TEXTS[i].prompt, TEXTS[i].answer, end=True, max_length=16)
        assert hit.example(i).tokens.tolist() == list(alone.tokens) and hit.example(i).answer == alone.answer
    assert hit.cut == sum(encode(tokenizer, *t[:2], end=True, max_length=16).cut > 0 for t in TEXTS) > 0
    loaders = [make_loader(s, batching="pack", max_length=16, batch_size=4, seed=0) for s in (memory, hit)]
    assert all(same(*(batch_of_step(loader, step) for loader in loaders)) for step in range(9))


def test_chunks_do_not_show(tokenizer, monkeypatch):
    from stablelora_jax.data import encoding

    whole = tokenize_dataset(tokenizer, TEXTS, max_length=16)
    for where in (module, encoding):
        monkeypatch.setattr(where, "AT_ONCE", 7)
    assert same(whole, tokenize_dataset(tokenizer, TEXTS, max_length=16))


def test_the_key_changes_with_everything_that_shapes_the_data(tokenizer, monkeypatch):
    given = dict(tokenizer=tokenizer, texts=TEXTS, max_length=16, truncate="left", chat=False)
    other, templated, ended = (copy.deepcopy(tokenizer) for _ in range(3))
    other.add_tokens(["zebra"])
    templated.chat_template = TEMPLATE
    ended.eos_token = ended.pad_token
    moved = [Text(TEXTS[0].prompt + " s", TEXTS[0].answer[2:], "t-0"), *TEXTS[1:]]
    changes = [
        {},
        dict(texts=TEXTS[:-1]),
        dict(texts=TEXTS[::-1]),
        dict(texts=moved),
        dict(max_length=17),
        dict(truncate="right"),
        dict(tokenizer=other),
        dict(tokenizer=ended),
        dict(tokenizer=templated, chat=True),
    ]
    keys = [digest(**{**given, **change}) for change in changes]
    templated.chat_template += "!"
    keys.append(digest(**{**given, "tokenizer": templated, "chat": True}))
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    keys.append(digest(**given))
    monkeypatch.undo()
    chats = [
        [t._replace(chat=Conversation([{"role": role, "content": t.prompt}])) for t in TEXTS]
        for role in ("user", "tool")
    ]
    chats.append([t._replace(chat=t.chat._replace(tools=[{"name": "f"}])) for t in chats[0]])
    as_chats = {**given, "tokenizer": templated, "chat": True}
    keys += [digest(**{**as_chats, "texts": texts}) for texts in chats]
    keys.append(digest(**{**as_chats, "texts": chats[0], "loss_on": "last"}))
    assert digest(**given | {"texts": chats[1]}) == keys[0], "messages count where they are read"
    assert len(set(keys)) == len(keys) == 15
    monkeypatch.undo()
    assert digest(**given) == digest(**given | {"texts": [t._replace(id="x") for t in TEXTS]}) == keys[0]
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert digest(**given) == keys[0], "what a call leaves in a tokenizer is not what it does"


@pytest.mark.parametrize("name", ["tokens.bin", "rows.bin", "about.json"])
@pytest.mark.parametrize("how", ["gone", "short", "other"])
def test_a_damaged_cache_is_made_again(tokenizer, tmp_path, name, how):
    made, said = tokenize_dataset(tokenizer, TEXTS, max_length=16, cache=tmp_path), []
    file = tmp_path / made.digest / name
    content = file.read_bytes()
    expected = [np.array(x) for x in made[:5]]
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-8] if how == "short" else bytes([content[0] ^ 1]) + content[1:])
    again = tokenize_dataset(tokenizer, TEXTS, max_length=16, cache=tmp_path, log_fn=said.append)
    assert same(again[:5], expected) and file.read_bytes() == content
    assert len(said) == 1 and "is damaged" in said[0] and name in said[0]
    assert [p.name for p in tmp_path.iterdir()] == [made.digest]


def test_a_build_that_fails_leaves_nothing(tokenizer, tmp_path):
    with pytest.raises(InputError, match="of t-6 has 19 tokens, more than max_length=18"):
        tokenize_dataset(tokenizer, TEXTS, max_length=18, truncate="error", cache=tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the token cache .* cannot be used"):
        tokenize_dataset(tokenizer, TEXTS, max_length=16, cache=tmp_path / "file")
    with pytest.raises(InputError, match="no text to train on"):
        tokenize_dataset(tokenizer, [], max_length=16)


def test_the_end_is_trained_even_where_it_is_the_pad(tokenizer):
    same_pad = copy.deepcopy(tokenizer)
    same_pad.pad_token = same_pad.eos_token
    store = tokenize_dataset(same_pad, TEXTS, max_length=64)
    assert same_pad.pad_token_id == same_pad.eos_token_id
    for batching in ("bucket", "pack"):
        loader = make_loader(store, batching=batching, max_length=64, batch_size=4, seed=0)
        for step in range(3):
            batch = batch_of_step(loader, step)
            ends = (batch.tokens == same_pad.eos_token_id) & (batch.segment_ids > 0)
            assert ends.any() and (batch.loss_mask[ends] == 1).all()
            assert (batch.loss_mask[batch.segment_ids == 0] == 0).all()
            assert all(ends[i].sum() == batch.segment_ids[i].max() for i in range(4))


def test_statistics_are_counted(tokenizer):
    store = tokenize_dataset(tokenizer, TEXTS, max_length=64)
    for batching in ("bucket", "pack"):
        loader = make_loader(store, batching=batching, max_length=64, batch_size=5, seed=0)
        steps = -(-loader.rows // 5)
        found = statistics(loader, steps)
        batches = [batch_of_step(loader, step) for step in range(steps)]
        assert loader.rows % 5 == 0, "so that the steps are the epoch"
        assert found["tokens"] == sum(int((b.segment_ids > 0).sum()) for b in batches)
        assert found["loss_tokens"] == sum(int(b.loss_mask.sum()) for b in batches)
        pads = sum(int((b.segment_ids == 0).sum()) for b in batches)
        assert found["padding"] == pytest.approx(pads / sum(b.tokens.size for b in batches), abs=1e-12)
        assert (found["texts"], found["rows"], found["cut"]) == (50, loader.rows, 0)
        assert found["epochs"] == steps * 5 / loader.rows and json.dumps(found)
    assert loader.rows < 20 and found["padding"] < 0.15


@pytest.mark.parametrize("cache", ["\0", "\ud800", "", "x" * 300])
def test_a_place_that_no_file_system_takes_is_one_line(tokenizer, cache):
    with pytest.raises(InputError, match="^data.cache "):
        tokenize_dataset(tokenizer, [Text("a", "b", "0")], max_length=16, cache=cache)


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chats(n):
    """Chats of 1 to 3 turns."""
    say = lambda role, i: {"role": role, "content": f"The cat number {i} is small"}
    talks = [[say(role, i) for i in range(1 + i % 3) for role in ("user", "assistant")] for i in range(n)]
    return [Text("", "", f"c-{i}", Conversation(talk)) for i, talk in enumerate(talks)]


@pytest.mark.parametrize("loss_on", ["assistant", "last"])
def test_chats_keep_their_masks(tokenizer, tmp_path, loss_on):
    chatty, texts = copy.deepcopy(tokenizer), chats(12)
    chatty.chat_template = TURNS
    how = dict(max_length=128, chat=True, loss_on=loss_on)
    memory, miss, hit = (tokenize_dataset(chatty, texts, **how, cache=cache) for cache in (None, tmp_path, tmp_path))
    assert same(memory, miss) and same(memory, hit) and memory.masks.dtype == hit.masks.dtype == np.uint8
    for i, text in enumerate(texts):
        tokens, mask = encode_chat(chatty, text.chat.messages, loss_on=loss_on)
        assert hit.example(i).tokens.tolist() == tokens and loss_mask(hit.example(i)).tolist() == mask
        assert loss_counts(hit)[i] == sum(mask) > 0
    for batching in ("bucket", "pack"):
        loader = make_loader(hit, batching=batching, max_length=128, batch_size=loader_rows(batching), seed=0)
        batches = [batch_of_step(loader, step) for step in range(loader.rows // loader.batch_size)]
        learnt = [np.sort(np.concatenate([b.tokens[b.loss_mask == 1] for b in batches]))]
        assert np.array_equal(learnt[0], np.sort(hit.tokens[hit.masks == 1]))
        assert statistics(loader, 1)["loss_tokens"] == hit.masks.sum()
        for b in batches:
            at = [row[row > 0].tolist() for row in b.loss_positions]
            assert at == [np.flatnonzero(row).tolist() for row in b.loss_mask]


def loader_rows(batching):
    return 4 if batching == "bucket" else 1


def test_answers_that_are_cut_off_are_counted(tokenizer, tmp_path):
    chatty, texts = copy.deepcopy(tokenizer), chats(12)
    chatty.chat_template = TURNS
    whole = tokenize_dataset(chatty, texts, max_length=128, chat=True)
    one, two, three = sorted({int(n) for n in whole.lengths})
    for cache in (None, tmp_path, tmp_path):
        left = tokenize_dataset(chatty, texts, max_length=two - 2, chat=True, cache=cache)
        assert (left.cut, left.clipped, left.empty) == (8, 4, 0), "of two turns, the beginning alone is lost"
        right = tokenize_dataset(chatty, texts, max_length=two, chat=True, truncate="right", cache=cache)
        assert (right.cut, right.clipped, right.empty, len(right.lengths)) == (4, 4, 0, 12)
    with pytest.raises(
        InputError, match="each of the 12 texts loses answers, or a part of one, to max_length=3: raise it"
    ):
        tokenize_dataset(chatty, texts, max_length=3, chat=True, truncate="right", cache=tmp_path)
    long = chats(1)[0].chat.messages
    texts.append(Text("", "", "long", Conversation([{**long[0], "content": "the cat " * 99}, long[1]])))
    cut = tokenize_dataset(chatty, texts, max_length=two, chat=True, truncate="right")
    assert (cut.empty, len(cut.lengths)) == (1, 12) and cut.tokens[: whole.lengths[0]].tolist() == whole.example(
        0
    ).tokens.tolist()
    with pytest.raises(InputError, match=r"^row 13 \(long\) has \d+ tokens, more than max_length=128"):
        tokenize_dataset(chatty, texts, max_length=128, chat=True, truncate="error")
