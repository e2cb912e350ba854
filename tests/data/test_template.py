"""Chat templates are rendered as transformers renders them, and whatever they do ends soon in one line."""

import os
import time

import pytest

from stablelora_jax.data import template
from stablelora_jax.data.template import render
from stablelora_jax.utils.errors import InputError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADERS = (
    "{{- bos_token }}{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}\n"
    "    {{- '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
INST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}{% else %}{% set loop_messages = messages %}"
    "{% set system = '' %}{% endif %}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}{% else %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}"
    "{% endif %}{% set ns.n = ns.n + 1 %}{% if not m.content %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
    "{{ ns.n }}{% if tools %}no{% endif %}{{ strftime_now('%Y')[:2] }}"
)
SYSTEM, USER, SAID = (
    {"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", '  Hi "é"\n'), ("assistant", "Yo"))
)
CHATS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, SAID, USER],
    "other keys": [{**USER, "name": None, "tool_calls": [{"f": "<x>"}]}],
}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", [CHATML, HEADERS, INST, TOOLS], ids=["ChatML", "headers", "INST", "tools"])
def test_it_is_what_transformers_renders(tokenizer, kind, chat):
    tokenizer.chat_template = kind
    expected = tokenizer.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, [CHATS[chat]] * 2, ["a", "b"]) == [expected] * 2
    if chat == "turns" and kind == CHATML:
        expected = tokenizer.apply_chat_template(CHATS[chat], tokenize=False, continue_final_message=True)
        assert render(tokenizer, [CHATS[chat]], ["a"], continue_final_message=True) == [expected]


def test_of_several_the_default_is_taken(tokenizer):
    tokenizer.chat_template = {"default": "D", "tool_use": "{{ 1/0 }}"}
    assert render(tokenizer, [CHATS["user"]], ["a"]) == ["D"]
    tokenizer.chat_template = {"a": "b"}
    with pytest.raises(InputError, match="the chat template of the tokenizer cannot be used: .*no default"):
        render(tokenizer, [CHATS["user"]], ["a"])


HOSTILE = {
    "raises": "{{ raise_exception('no\nno') }}",
    "syntax": "{% if %}",
    "undefined": "{{ nothing.x.y }}",
    "divides": "{{ 1/0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long range": "{% for i in range(10**9) %}x{% endfor %}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "attributes": "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os }}",
    "mutates": "{% set _ = messages.append(1) %}",
    "a long text": "{{ 'a' * 10**11 }}",
    "a long list": "{{ [1] * 10**10 }}",
    "padding": "{{ 'a'.ljust(10**11) }}",
    "a wide number": "{{ '%20000000000d' | format(3) }}",
    "doubles": "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "too long": "{{ 'x' * 20000000 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_template_does_is_one_line(tokenizer, name):
    tokenizer.chat_template = HOSTILE[name]
    with pytest.raises(InputError, match="^prompt 0: the chat template does not take it .") as error:
        render(tokenizer, [CHATS["user"]], ["prompt 0"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 and not os.path.exists("PWNED")


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power, in C": "{{ (9 ** 9999999) ** 99 }}",
}


def test_what_never_ends_is_ended_and_the_next_is_served(tokenizer, monkeypatch, tmp_path):
    quick = template.WORKER.read_text().replace("SECONDS = 5.0", "SECONDS = 0.5")
    (tmp_path / "worker.py").write_text(quick)
    template._end_all()
    monkeypatch.setattr(template, "WORKER", tmp_path / "worker.py")
    for kind in ENDLESS.values():
        tokenizer.chat_template, began = kind, time.monotonic()
        with pytest.raises(
            InputError, match="a: the chat template does not take it .it takes more than 5 seconds, or too much memory"
        ):
            render(tokenizer, [CHATS["user"]], ["a"])
        assert time.monotonic() - began < 9
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render(tokenizer, [CHATS["user"]], ["a"]) == [USER["content"]]
    template._end_all()


@pytest.mark.parametrize("value", [3, [1], b"x", 1.5])
def test_a_template_that_is_no_text_is_named(tokenizer, value):
    tokenizer.chat_template = value
    with pytest.raises(InputError, match="the chat template of the tokenizer is .*, not text"):
        render(tokenizer, [CHATS["user"]], ["a"])


@pytest.mark.parametrize("message", ["x", 3, None, ["role"], {"role": "user", "content": {1, 2}}, {"a": object()}])
def test_a_message_that_is_none_is_named(tokenizer, message):
    tokenizer.chat_template = "x"
    with pytest.raises(InputError, match="a message of p must be a mapping|a message holds what is no JSON"):
        render(tokenizer, [[message]], ["p"])
    with pytest.raises(InputError, match="no chat template"):
        render(type("T", (), {"chat_template": None})(), [CHATS["user"]], ["p"])
