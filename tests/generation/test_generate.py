"""Generation against ``transformers.generate``; pads, batches, adapters, stops; and every way to ask for it wrongly."""

import dataclasses
import importlib.util
import io
import json
import os
import stat
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import (
    InputError,
    LoraSpec,
    adapted,
    base_directory,
    init_adapters,
    load_pretrained,
    merge,
    save_peft,
)
from stablelora_jax.generation import decode
from stablelora_jax.generation.generate import encode_prompts, generate
from tests.conftest import ROOT
from tests.helpers import tiny_decoder, trained
from tests.utils.test_outputs import snapshot

WORDS = (
    "The big bear and the small cat went to a river in the dark wood where an old fox had a boat of red leaves and fish"
).split()
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SPEC = LoraSpec(target_modules=["q_proj", "v_proj", "down_proj"], rank=4)


def prompts(count):
    """As many prompts as asked for, each of another length."""
    return [" ".join(WORDS[: n + 1]) for n in range(count)]


@pytest.fixture(scope="module")
def base():
    """The package's own small model: ``(model, params)``."""
    return load_pretrained(base_directory())


@pytest.fixture(scope="module")
def lora(base):
    """Adapters for it, as if trained."""
    return trained(init_adapters(jax.random.key(0), base[1], SPEC), SPEC, size=0.2)


def texts(results):
    return [result.text for result in results]


def ids(results):
    return [result.tokens for result in results]


def theirs(model, results, new, eos):
    """The tokens of ``transformers.generate``, for all prompts at once, padded on the left as it wants them."""
    import torch

    longest = max(len(result.prompt) for result in results)
    tokens = torch.tensor([[0] * (longest - len(result.prompt)) + list(result.prompt) for result in results])
    mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in results])
    settings = dict(max_new_tokens=new, do_sample=False, eos_token_id=list(eos), pad_token_id=0)
    rows = model.generate(tokens, attention_mask=mask, **settings)[:, longest:].tolist()
    ends = [next((n for n, token in enumerate(row, 1) if token in eos), new) for row in rows]
    return [tuple(row[:end]) for row, end in zip(rows, ends, strict=True)]


def test_stories260k_as_transformers_generates(shared):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    directory = shared("models/stories260K")
    model, params = load_pretrained(directory)
    results = generate(model, {"params": params}, prompts(20), max_new_tokens=48)
    assert len({len(result.prompt) for result in results}) == 20
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert ids(results) == theirs(reference, results, 48, model.config.eos_token_id)


def test_smollm2_as_transformers_generates(smollm2):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, params = load_pretrained(smollm2)
    asked = [*prompts(3), [{"role": "user", "content": "What is gravity?"}]]
    results = generate(model, {"params": params}, asked, max_new_tokens=12)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    assert ids(results) == theirs(reference.eval(), results, 12, model.config.eos_token_id)


@pytest.mark.parametrize("settings", [{}, dict(sliding_window=4)], ids=["qwen2", "mistral"])
def test_random_models_as_transformers_generates(settings, tmp_path):
    """With a window far shorter than the prompt, and logits that are not those of a text."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cls = transformers.MistralConfig if settings else transformers.Qwen2Config
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(cls(**sizes, num_key_value_heads=2, **settings)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.4)
    reference.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    asked = [rng.integers(0, 61, n).tolist() for n in (1, 5, 9, 17)]
    results = generate(model, {"params": params}, asked, max_new_tokens=20, stop_ids=[])
    assert ids(results) == theirs(reference, results, 20, [-1])


def test_the_cache_continues_as_reading_it_all_again_does(base):
    model, params = base
    results = generate(model, {"params": params}, prompts(3), max_new_tokens=6)
    whole = jax.jit(model.apply)
    for result in results:
        row = np.zeros((1, 24), np.int32)
        row[0, : len(result.prompt) + len(result.tokens)] = result.prompt + result.tokens
        likeliest = whole({"params": params}, row)[0].argmax(axis=-1)[len(result.prompt) - 1 :][: len(result.tokens)]
        assert tuple(likeliest.tolist()) == result.tokens


def padded(asked, side):
    length = max(map(len, asked)) + 3
    tokens, mask = np.full((2, len(asked), length), 7)
    for i, own in enumerate(asked):
        place = slice(0, len(own)) if side == "right" else slice(length - len(own), length)
        tokens[i, place], mask[i] = own, 0
        mask[i, place] = 1
    return tokens, mask


def test_the_side_of_the_pads_changes_no_token(base):
    model, params = base
    asked = encode_prompts(model.tokenizer, prompts(6))
    outs = [
        decode.generate_tokens(model, {"params": params}, *padded(asked, side), max_new_tokens=20, stop_ids=[2])
        for side in ("left", "right")
    ]
    assert np.array_equal(outs[0][0], outs[1][0]) and np.array_equal(outs[0][1], outs[1][1])
    expected = generate(model, {"params": params}, prompts(6), max_new_tokens=20, stop_ids=[2])
    assert [tuple(row[:n]) for row, n in zip(*outs[0], strict=True)] == ids(expected)


def test_a_prompt_continues_alone_as_in_a_batch(base):
    model, params = base
    whole = generate(model, {"params": params}, prompts(5), max_new_tokens=16)
    assert generate(model, {"params": params}, prompts(5), max_new_tokens=16, batch_size=2) == whole
    assert generate(model, {"params": params}, prompts(5)[3:4], max_new_tokens=16) == whole[3:4]


def test_adapters_on_off_and_merged(base, lora):
    model, params = base
    seen = lambda variables, model=model: ids(generate(model, variables, prompts(4), max_new_tokens=16))
    plain, tuned = seen({"params": params}), adapted(model, SPEC)
    fresh = init_adapters(jax.random.key(0), params, SPEC)
    assert seen({"params": params}, tuned) == plain
    assert seen({"params": params, "lora": fresh}, tuned) == plain
    changed = seen({"params": params, "lora": lora}, tuned)
    assert changed == seen({"params": merge(params, lora, SPEC)}) and changed != plain


def test_one_compilation_for_each_bucket_of_lengths(base):
    """Prompts, parameters, stop ids, temperature, top-k and top-p are data; lengths in one bucket are one program."""
    model, params = base
    model = model.clone(config=dataclasses.replace(model.config, max_position_embeddings=999))  # that no test has run
    before = decode._start._cache_size(), decode._extend._cache_size()
    new = lambda: (decode._start._cache_size() - before[0], decode._extend._cache_size() - before[1])
    run = lambda asked, params=params, **more: generate(model, {"params": params}, asked, **more)
    run(prompts(3), max_new_tokens=5, temperature=0.7, top_k=3)
    run(prompts(9)[4:7], max_new_tokens=9, temperature=1.3, top_p=0.5, seed=3)
    run(prompts(3), jax.tree.map(lambda p: p * 1.01, params), max_new_tokens=5, temperature=1.0, stop_ids=[5, 6, 7])
    assert new() == (1, 1)
    run(prompts(3), max_new_tokens=5)  # greedy is a program of its own
    run([" ".join(WORDS * 3)] * 3, max_new_tokens=5)
    assert new() == (3, 3)


def test_the_cache_is_donated_and_may_be_narrow(base):
    model, params = base
    accum_dtype = generate(model, {"params": params}, prompts(3), max_new_tokens=12)
    assert ids(generate(model, {"params": params}, prompts(3), max_new_tokens=12, cache_dtype=jnp.float32)) == ids(
        accum_dtype
    )
    tokens, mask = padded(encode_prompts(model.tokenizer, prompts(2)), "right")
    keys, stops = jax.random.split(jax.random.key(0)), np.full(8, -1, np.int32)
    state = decode._start(model, {"params": params}, tokens, mask, None, stops, keys, 64, 32, jnp.dtype(jnp.bfloat16))
    assert state.cache.k.dtype == jnp.bfloat16
    after = decode._extend(model, {"params": params}, state, None, stops, keys, 4)
    assert state.cache.k.is_deleted() and int(after.step) == 4 and int(after.cache.used) == tokens.shape[1] + 3


def test_draws_belong_to_the_prompt_s_place_and_the_seed(base):
    model, params = base

    def draw(asked=WORDS[:4], **more):
        return generate(model, {"params": params}, asked, max_new_tokens=12, temperature=1.5, **more)

    whole = draw()
    assert draw(batch_size=3) == whole and draw(seed=1) != whole
    assert draw(WORDS[:2]) == whole[:2]
    same = draw([WORDS[2]] * 4)
    assert len(set(texts(same))) > 1 and same[2] == whole[2]
    assert ids(draw(top_k=1)) == ids(generate(model, {"params": params}, WORDS[:4], max_new_tokens=12))


def test_stop_ids(base):
    model, params = base
    free = generate(model, {"params": params}, prompts(3), max_new_tokens=20, stop_ids=[])
    assert {result.stop for result in free} == {"length"} and all(len(result.tokens) == 20 for result in free)
    end = free[0].tokens[6]
    for result, whole in zip(
        generate(model, {"params": params}, prompts(3), max_new_tokens=20, stop_ids=[end, 10**6]), free, strict=True
    ):
        cut = whole.tokens.index(end) + 1 if end in whole.tokens else 20
        assert result.tokens == whole.tokens[:cut] and result.stop == (
            "stop_id" if cut < 20 or end == whole.tokens[-1] else "length"
        )
        assert whole.text.startswith(result.text)
    assert model.tokenizer.decode(end) not in result.text or result.stop == "length"


def test_stop_strings(base):
    """The text ends before the string; the tokens end with the one that completes it."""
    model, params = base
    run = lambda **more: generate(model, {"params": params}, prompts(3), max_new_tokens=40, stop_ids=[], **more)
    free = run()
    stops = [free[1].text[31:36], free[1].text[25:30], "never to be seen"]  # the later one first
    for result, whole in zip(run(stop_strings=stops), free, strict=True):
        assert result.tokens == whole.tokens[: len(result.tokens)]
        if places := [whole.text.index(stop) for stop in stops if stop in whole.text]:
            assert result.stop == "stop_string" and result.text == whole.text[: min(places)]
            shorter = model.tokenizer.decode(result.prompt + result.tokens[:-1])
            assert not any(stop in shorter[len(model.tokenizer.decode(result.prompt)) :] for stop in stops)
        else:
            assert result == whole
    assert run(stop_strings=["never to be seen"]) == free


def test_texts_read_as_in_their_place(shared):
    """A tokenizer that drops the space before the first word drops none here."""
    model, params = load_pretrained(shared("models/stories260K"))
    result = generate(model, {"params": params}, ["Once upon a"], max_new_tokens=20)[0]
    whole = model.tokenizer.decode(result.prompt + result.tokens, skip_special_tokens=True)
    assert result.text.startswith(" ") and whole == "Once upon a" + result.text


def test_chats_go_through_the_template(base, monkeypatch):
    model, params = base
    messages = [{"role": "user", "content": "big cat"}]
    with pytest.raises(InputError, match="prompt 0 is a chat, and the model's tokenizer has no chat template"):
        generate(model, {"params": params}, [messages])
    monkeypatch.setattr(model.tokenizer, "chat_template", CHAT, raising=False)
    chat, text = generate(model, {"params": params}, [messages, "user: big cat\nassistant:"], max_new_tokens=4)
    bos = [model.tokenizer.bos_token_id]
    assert list(chat.prompt) == [token for token in text.prompt if [token] != bos]
    with pytest.raises(InputError, match="prompt 1: the chat template does not take it"):
        generate(model, {"params": params}, ["a", [{"content": "no role"}]])


def test_no_prompt_is_no_result(base):
    assert generate(base[0], {"params": base[1]}, []) == []


BAD = {
    "one_string": (dict(prompts="big cat"), "prompts must be a list"),
    "one_chat": (dict(prompts=[{"role": "user", "content": "x"}]), "prompt 0 must be a string"),
    "number": (dict(prompts=[3]), "prompt 0 must be a string"),
    "empty": (dict(prompts=["a", []]), "prompt 1 is empty"),
    "vocabulary": (dict(prompts=[[5, 725]]), "token id 725 is outside the model's vocabulary of 725"),
    "negative": (dict(prompts=[[-1]]), "token id -1 is outside"),
    "long": (dict(prompts=[[5] * 250], max_new_tokens=10), "a prompt of 250 tokens and max_new_tokens=10 exceed"),
    "no_tokens": (dict(max_new_tokens=0), "max_new_tokens must be"),
    "temperature": (dict(temperature=-1.0), "temperature must be"),
    "top_p": (dict(temperature=1.0, top_p=2.0), "top_p must be"),
    "stop": (dict(stop_strings="word"), "stop_strings must be a list"),
    "empty_stop": (dict(stop_strings=[""]), "stop_strings must be a list"),
    "batch": (dict(batch_size=0), "batch_size must be positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case, base):
    changes, message = BAD[case]
    arguments = {"prompts": ["big cat"], "max_new_tokens": 4, **changes}
    with pytest.raises(InputError, match=message) as error:
        generate(base[0], {"params": base[1]}, arguments.pop("prompts"), **arguments)
    assert "\n" not in str(error.value)


def test_without_a_tokenizer():
    model, params = tiny_decoder()
    result = generate(model, {"params": params}, [[1, 2], [3]], max_new_tokens=3)
    assert [r.text for r in result] == [None, None] and [len(r.tokens) for r in result] == [3, 3]
    for prompt, more in (("x", {}), ([1], {"stop_strings": ["x"]})):
        with pytest.raises(InputError, match="no tokenizer|model has none"):
            generate(model, {"params": params}, [prompt], **more)


@pytest.fixture
def command(monkeypatch, capsys):
    """``experiments/generate.py`` in this process: arguments -> (exit code, standard output, standard error)."""
    spec = importlib.util.spec_from_file_location("generate_script", ROOT / "experiments" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = module.main()
        return code, *capsys.readouterr()

    return run


def test_the_command(command, base, lora, tmp_path):
    model, params = base
    directory = tmp_path / "run"
    save_peft(directory / "adapter", lora, SPEC, params=params)
    expected = texts(generate(model, {"params": params}, prompts(2), max_new_tokens=8))
    tuned = texts(generate(adapted(model, SPEC), {"params": params, "lora": lora}, prompts(2), max_new_tokens=8))
    common = (base_directory(), "--max-new-tokens", 8)
    code, out, err = command(*common, stdin="\n".join(prompts(2)))
    assert (code, err) == (0, "") and out == "".join(p + t + "\n" for p, t in zip(prompts(2), expected, strict=True))
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join([json.dumps(prompts(2)[0]), "", json.dumps({"prompt": prompts(2)[1]})]))
    for more in ((directory,), (directory / "adapter", "--merged", "--batch-size", 1)):
        written = tmp_path / "out" / f"{len(more)}.jsonl"
        code, out, _ = command(*common, "--prompts", asked, "--output", written, "--adapter", *more)
        rows = [json.loads(line) for line in written.read_text().splitlines()]
        assert (code, out) == (0, "") and [row["text"] for row in rows] == tuned
        assert [row["prompt"] for row in rows] == prompts(2) and {row["stop"] for row in rows} <= {"length", "stop_id"}


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((), "there is no prompt"),
        (("--prompt", "a", "--merged"), "--merged needs --adapter"),
        (("--prompt", "a", "--prompts", "b"), "not both"),
        (("--prompts", "no/such/file"), "no/such/file cannot be read"),
        (("--prompt", "a", "--adapter", "no/such/dir"), "no/such/dir"),
        (("--prompt", "a", "--chat"), "no chat template"),
        (("--prompt", "a", "--top-k", "3"), "give a temperature above 0"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, command):
    code, out, err = command(base_directory(), *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["mine.txt", "link", "dangling", "folder", "mine.txt/below", "x" * 250, "x" * 300])
def test_an_output_replaces_nothing(command, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("mine")
    Path("link").symlink_to("mine.txt")
    Path("dangling").symlink_to("nowhere")
    Path("folder").mkdir()
    before = snapshot(tmp_path)
    code, out, err = command(base_directory(), "--prompt", "x", "--max-new-tokens", 2, "--output", name)
    if name == "x" * 250:
        assert code == 0 and Path(name).is_file()
        return
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and name[:9] in err
    assert snapshot(tmp_path) == before


def test_an_output_into_a_pipe(command, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    said = []
    reader = threading.Thread(target=lambda: said.append((tmp_path / "pipe").read_text()))
    reader.start()
    code, out, err = command(
        base_directory(), "--prompt", "x", "--max-new-tokens", 2, "--output", tmp_path / "pipe", "--temperature", "0"
    )
    reader.join()
    assert (code, out, err) == (0, "", "") and json.loads(said[0])["prompt"] == "x"
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)


def test_a_bank_gives_each_prompt_its_adapter_in_any_order():
    from stablelora_jax import LoraSpec, adapted, banked, generate, init_adapters, make_bank
    from tests.helpers import tiny_decoder, trained

    model, params = tiny_decoder()
    specs = [LoraSpec(rank=2, alpha=8), LoraSpec(rank=3, target_modules=["o_proj"])]
    made = [trained(init_adapters(jax.random.key(i), params, spec), spec, seed=i) for i, spec in enumerate(specs)]
    bank = make_bank(params, list(zip(made, specs, strict=True)))
    prompts, rows = [[1, 2], [3, 4, 5, 6], [7], [8, 9, 10]], [0, -1, 1, 0]
    variables = {"params": params, "bank": bank, "rows": rows}
    settings = dict(max_new_tokens=6, stop_ids=())
    found = [g.tokens for g in generate(banked(model), variables, prompts, batch_size=3, **settings)]
    for prompt, row, tokens in zip(prompts, rows, found, strict=True):
        lora = {} if row < 0 else {"lora": made[row]}
        alone = generate(adapted(model, specs[row]), {"params": params, **lora}, [prompt], **settings)[0].tokens
        assert tokens == alone
    for wrong, message in (([0], "do not name an adapter for each"), ([0, 1, 2, 0], "must be from -1")):
        with pytest.raises(InputError, match=message):
            generate(banked(model), {**variables, "rows": wrong}, prompts, **settings)
    with pytest.raises(InputError, match="a bare decoder does not read 'lora'"):
        generate(model, {"params": params, "lora": made[0]}, prompts, **settings)
    for ids in ([[10**30, 2]], [[-1]], [[31]]):
        with pytest.raises(InputError, match="prompt 0: token id"):
            generate(model, {"params": params}, ids, **settings)
    with pytest.raises(InputError, match="stop_ids must be a list of token ids"):
        generate(model, {"params": params}, prompts, stop_ids=2)


def test_a_special_token_stops_as_a_string(base):
    model, params = base
    end = model.tokenizer.convert_ids_to_tokens(model.config.eos_token_id[0])
    (plain,) = generate(model, {"params": params}, ["The bear is"], max_new_tokens=40)
    (named,) = generate(model, {"params": params}, ["The bear is"], max_new_tokens=40, stop_ids=(), stop_strings=[end])
    assert plain.stop == "stop_id" and named.tokens == plain.tokens
