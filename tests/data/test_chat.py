"""The loss of a chat is on what the assistant says and on what ends its turn, and on nothing else."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelora_jax import InputError
from stablelora_jax.data import encode_chat
from stablelora_jax.data.chat import _mask, encode_chats
from stablelora_jax.data.chat_spans import Rendered
from stablelora_jax.data.conversation import Conversation
from stablelora_jax.data.encoding import Text, encode_many
from tests.data.chats import CHATS, SYSTEM, TOOLS, answered, calls, said, thought, turns, user

HEAD = "{% for m in messages %}<|{{ m.role }}|>\n"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
PLAIN = HEAD + "{{ m.content }}" + CALLS + "</s>\n{% endfor %}" + PROMPT
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}" + CALLS + "</s>\n{% endgeneration %}"
    "{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}" + PROMPT
)
FOOTER = (
    HEAD + "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
SPACED = "{% for m in messages %}{{ '[' + m.content + '] ' if m.role == 'user' else m.content + '</s> ' }}{% endfor %}"
THINKING = (  # writes a thinking block in the last turn alone, as Qwen3 does
    HEAD
    + "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}" + PROMPT
)
OPENED = THINKING.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")


@functools.cache
def byte_tokenizer():
    """A token for each byte, and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", name_or_path="some/model")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def learnt(tokenizer, template, messages, **how):
    """The text that carries loss, in the pieces in which it stands."""
    tokenizer.chat_template = template
    ids, mask = encode_chat(tokenizer, messages, **how)
    expected = tokenizer.apply_chat_template(messages, tools=how.get("tools"), return_dict=False)
    assert ids == expected and set(mask) <= {0, 1}
    pieces, before = [], 0
    for token, own in zip(ids, mask, strict=True):
        if own:
            pieces = [*pieces, []] if not before else pieces
            pieces[-1].append(token)
        before = own
    return [tokenizer.decode(piece) for piece in pieces]


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<>[]|"), min_size=1, max_size=9).filter(str.strip)


@pytest.mark.parametrize(
    "template,end",
    [(PLAIN, "</s>\n"), (MARKED, "</s>\n"), (FOOTER, "<|end|>"), (SPACED, "</s>")],
    ids=["plain", "marked", "footer", "spaced"],
)
@settings(max_examples=10, deadline=None)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_the_loss_is_on_the_answers_and_their_ends(tokenizer, template, end, texts):
    roles = zip(("user", "assistant") * len(texts), (text for pair in texts for text in pair), strict=True)
    messages = [{"role": role, "content": text} for role, text in roles]
    answers = [answer + end for _, answer in texts]
    if template is FOOTER:
        answers[-1] += "</s>"
    assert learnt(tokenizer, template, messages) == answers
    assert learnt(tokenizer, template, messages, loss_on="last") == answers[-1:]


@pytest.mark.parametrize("name", CHATS)
def test_marks_and_prefixes_agree(tokenizer, name):
    messages, tools = CHATS[name]
    for loss_on in ("assistant", "last"):
        by_marks, by_prefixes = (learnt(tokenizer, t, messages, tools=tools, loss_on=loss_on) for t in (MARKED, PLAIN))
        assert by_marks == by_prefixes
        assert len(by_marks) == (1 if loss_on == "last" else sum(m["role"] == "assistant" for m in messages))
    assert '<call>add{"a": 0}</s>\n' in by_marks or not any("tool_calls" in m for m in messages[-1:])


def test_the_last_turn_is_prompt_and_completion(tokenizer):
    tokenizer.chat_template = PLAIN
    for n in (1, 3):
        messages = turns(n, system=True)
        ids, mask = encode_chat(tokenizer, messages, loss_on="last")
        start = mask.index(1)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert ids[:start] == prompt and all(mask[start:])
        assert tokenizer.decode(ids[start:]) == messages[-1]["content"] + "</s>\n"
    (example,) = encode_many(
        tokenizer, [Text(user(0)["content"], said(0)["content"], "x")], end=True, max_length=99, chat=True
    )
    ids, mask = encode_chat(tokenizer, turns(1), loss_on="last")
    assert ids[:-1] == list(example.tokens) and mask.index(1) == example.answer, "all but the line break behind it"


def test_thinking(tokenizer):
    think = lambda text, i: f"<think>\n{text}\n</think>\n\nAnswer {i} é😀.</s>\n"
    one, two = [user(0), said(0, **thought(0))], [user(0), said(0), user(1), said(1, **thought(1))]
    for template in (THINKING, OPENED):
        assert learnt(tokenizer, template, one) == [think("Thought 0", 0)]
        assert learnt(tokenizer, template, two) == ["Answer 0 é😀.</s>\n", think("Thought 1", 1)]
        dropped = [*one, user(1), said(1, **thought(1))]
        with pytest.raises(
            InputError, match="template of some/model does not keep the text up to message 2 .*loss_on=last"
        ):
            encode_chat(tokenizer, dropped)
        assert learnt(tokenizer, template, dropped, loss_on="last") == [think("Thought 1", 1)]


UNFIT = {
    "the prompt is not how it begins": (
        PLAIN.replace(PROMPT, "{% if add_generation_prompt %}Say:{% endif %}"),
        "begins message 2 other",
    ),
    "thinking that the turn has not": (
        PLAIN.replace("nt|>\n{% e", "nt|>\n<think>\n{% e"),
        "begins message 2 otherwise",
    ),
    "no end": (
        HEAD + "{{ m.content }}\n{% endfor %}" + PROMPT,
        "ends no turn of the assistant, so that it would never",
    ),
    "counts messages": ("{{ messages | length }}" + PLAIN, "does not keep the text up to message 2|begins message 2"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_template_that_cannot_be_followed_is_named(tokenizer, name):
    tokenizer.chat_template, message = UNFIT[name]
    with pytest.raises(InputError, match=f"^the chat: the chat template of some/model ({message})") as error:
        encode_chat(tokenizer, turns(2))
    assert "\n" not in str(error.value)


def test_a_turn_that_continues_behind_a_tool_is_refused(tokenizer):
    tokenizer.chat_template = (  # no prompt behind a tool's answer, though the turn has a header there
        HEAD + "{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|assistant|>\n{% endif %}"
    )
    with pytest.raises(InputError, match="does not say where message 4 begins"):
        encode_chat(tokenizer, [user(0), calls(0), answered(1), said(0)], tools=TOOLS)


def test_lists_of_text(tokenizer):
    listed = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in turns(2)]
    blocks = PLAIN.replace("{{ m.content }}", "{% for b in m.content %}{{ b.text }}{% endfor %}")
    assert learnt(tokenizer, blocks, listed) == learnt(tokenizer, PLAIN, turns(2))
    tokenizer.chat_template = PLAIN
    with pytest.raises(InputError, match="writes the list of content of message 1 as it is"):
        encode_chat(tokenizer, listed)


def test_many_are_each_alone(tokenizer):
    tokenizer.chat_template = PLAIN
    chats = [Conversation(tuple(messages), tools) for messages, tools in CHATS.values()] * 20
    together = encode_chats(tokenizer, chats, list(map(str, range(len(chats)))), loss_on="assistant")
    alone = [encode_chat(tokenizer, messages, tools=tools) for messages, tools in CHATS.values()]
    assert [(one.tokens, one.mask) for one in together] == alone * 20


BAD = {
    "no list": ("x", None, "a chat is a list of messages"),
    "empty": ([], None, "a chat is a list of messages"),
    "a string": (["x"], None, "message 1 is 'x'"),
    "no role": ([{"content": "x"}], None, "message 1 is .*a message is"),
    "an unknown role": ([{"role": "human", "content": "x"}], None, "has the role 'human', which is none of system"),
    "a role that is no text": ([{"role": 3, "content": "x"}], None, "has the role 3"),
    "the assistant first": (
        [said(0)],
        None,
        "message 1 of the assistant is the first: it may follow the user's or the tool's",
    ),
    "the tool first": ([answered(1)], None, "message 1 of the tool is the first"),
    "two users": ([user(0), user(1), said(0)], None, "message 2 of the user follows the user's"),
    "two answers": ([user(0), said(0), said(1)], None, "message 3 of the assistant follows the assistant's"),
    "a system in the middle": ([user(0), said(0), SYSTEM], None, "message 3 of the system follows the assistant's"),
    "two systems": ([SYSTEM, SYSTEM, user(0)], None, "message 2 of the system follows the system's"),
    "a user behind a tool": (
        [user(0), calls(0), answered(1), user(1)],
        None,
        "message 4 of the user follows the tool's",
    ),
    "no assistant": ([SYSTEM, user(0)], None, "no message of the assistant"),
    "no content": ([user(0), {"role": "assistant"}], None, "message 2 of the assistant has no content"),
    "empty content": ([user(0), {"role": "assistant", "content": " \n"}], None, "message 2 .* has no content"),
    "an empty user": ([{"role": "user", "content": ""}, said(0)], None, "message 1 of the user has no content"),
    "an empty list": ([{"role": "user", "content": []}, said(0)], None, "message 1 of the user has no content"),
    "a number": ([{"role": "user", "content": 7}, said(0)], None, "has a content of int, not text"),
    "a mapping": ([{"role": "user", "content": {"text": "x"}}, said(0)], None, "has a content of dict, not text"),
    "a nested list": ([{"role": "user", "content": [["x"]]}, said(0)], None, "has a content that holds list, not text"),
    "strings in a list": ([{"role": "user", "content": ["x"]}, said(0)], None, "a content that holds str, not text"),
    "an image": (
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}, said(0)],
        None,
        "holds 'image': only text",
    ),
    "a block of nothing": (
        [{"role": "user", "content": [{"type": "text"}]}, said(0)],
        None,
        "block of text without a text",
    ),
    "half a surrogate": ([{"role": "user", "content": "\ud800"}, said(0)], None, "half of a surrogate pair"),
    "calls that are none": (
        [user(0), {"role": "assistant", "tool_calls": "add"}],
        None,
        "has tool_calls that are no list",
    ),
    "a call without a name": ([user(0), {"role": "assistant", "tool_calls": [{}]}], None, "has tool_calls that are no"),
    "no calls": ([user(0), {"role": "assistant", "tool_calls": []}], None, "message 2 of the assistant has no content"),
    "tools that are none": (turns(1), {"name": "add"}, "tools are a list of JSON schemas"),
    "tools of text": (turns(1), ["add"], "tools are a list of JSON schemas"),
    "no JSON": ([{**user(0), "extra": {1, 2}}, said(0)], None, "holds what is no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_chat_is_one_line(tokenizer, name):
    tokenizer.chat_template = PLAIN
    messages, tools, message = BAD[name]
    with pytest.raises(InputError, match=message) as error:
        encode_chat(tokenizer, messages, tools=tools)
    assert "\n" not in str(error.value)


def test_arguments(tokenizer):
    tokenizer.chat_template = PLAIN
    with pytest.raises(InputError, match="loss_on must be assistant or last, not 'user'"):
        encode_chat(tokenizer, turns(1), loss_on="user")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        encode_chat(tokenizer, turns(1))
    with pytest.raises(InputError, match="needs a fast tokenizer"):
        encode_chat(object(), turns(1))


def test_rows_whose_tool_calls_or_reasoning_the_template_leaves_out_are_named(tokenizer):
    for template, (messages, tools), missing in (
        (PLAIN.replace(CALLS, ""), CHATS["a call"], "tool calls"),
        (PLAIN, CHATS["reasoning"], "reasoning"),
        (PLAIN.replace(CALLS, ""), CHATS["reasoning in a call"], "tool calls and the reasoning"),
    ):
        tokenizer.chat_template = template
        texts = [Text("", "", "a", Conversation(turns(1))), Text("", "", "b", Conversation(messages, tools))]
        with pytest.raises(
            InputError, match=rf"^row 2 \(b\): the chat template does not write the {missing} of the as"
        ):
            list(encode_many(tokenizer, texts, end=True, max_length=999, chat=True))


def test_a_token_that_holds_any_character_of_an_answer_is_a_loss_token():
    spans = [(3, 5), (9, 10)]
    offsets = [(0, 2), (2, 4), (4, 6), (6, 8), (8, 11), (11, 12)]
    assert _mask(offsets, Rendered("", spans, ())) == [0, 1, 1, 0, 1, 0]
