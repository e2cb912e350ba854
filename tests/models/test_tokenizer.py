"""A stranger's tokenizer: its code never runs, nobody is asked, and its rules neither flood memory nor never end."""

import builtins
import json
import shutil

import pytest

from stablelora_jax import InputError, base_directory
from stablelora_jax.models.pretrained.tokenizer import NESTED, load_tokenizer
from stablelora_jax.runs.cli import exit_code

EVIL = """import pathlib
pathlib.Path(__file__).with_name("PWNED").touch()
from transformers import PreTrainedTokenizerFast
class T(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def directory(tmp_path):
    shutil.copytree(base_directory(), tmp_path / "m")
    return tmp_path / "m"


def change(path, **keys):
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(raw | keys))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("map_", [["evil.T", None], ["evil.T", "evil.T"], [None, "evil.T"], "evil.T"])
def test_its_code_never_runs_and_nobody_is_asked(directory, monkeypatch, whole, map_, tmp_path):
    def asked(*_):
        pytest.fail("somebody is asked")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (directory / "evil.py").write_text(EVIL)
    change(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": map_},
        tokenizer_class="T",
        trust_remote_code=True,
    )
    change(directory / "config.json", auto_map={"AutoConfig": "evil.T", "AutoModelForCausalLM": "evil.T"})
    if not whole:
        (directory / "tokenizer.json").unlink()
        (directory / "vocab.json").write_text('{"a": 0, "<s>": 1, "</s>": 2, "<unk>": 3}')
        with pytest.raises(InputError, match="it needs code of its own .auto_map., which is never run") as error:
            load_tokenizer(directory)
        assert "\n" not in str(error.value)
    else:
        assert load_tokenizer(directory)("The bear").input_ids
    assert not list(tmp_path.rglob("PWNED"))


REAL = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re|'ve)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s",
    r" ?[^(\s|[.,!?])]+",
    r"\p{N}{1}",
]
ENDLESS = [r"(a+)+$", r"(([a-z_.0-9]+)+)+!", r"(?:a*)*b", r"(a{1,9}){1,}", r"([^()]+)*", r"(x+x+)+y"]


def test_expressions_that_repeat_a_repetition():
    assert not [expression for expression in REAL if NESTED.search(expression)]
    assert not [expression for expression in ENDLESS if not NESTED.search(expression)]


def rule(kind, **more):
    return {"type": kind, **more}


FLOOD = rule("Replace", pattern={"String": "a"}, content="a" * 1000)
SPLIT = {"behavior": "Isolated", "invert": False}
HOSTILE = {
    "a flood": ({"normalizer": FLOOD}, "the normalizer makes a text 1000 times as long"),
    "a flood by steps": (
        {"normalizer": rule("Sequence", normalizers=[rule("Replace", pattern={"String": "a"}, content="a" * 9)] * 9)},
        "the normalizer makes a text 387420489 times as long",
    ),
    "a flood when it decodes": ({"decoder": FLOOD}, "the decoder makes a text 1000 times as long"),
    "a beginning": (
        {"normalizer": rule("Prepend", prepend="x" * 999)},
        "the normalizer makes a text 999 times as long",
    ),
    "an expression": (
        {"pre_tokenizer": rule("Split", pattern={"Regex": "(a+)+$"}, **SPLIT)},
        r"pre_tokenizer's expression '\(a\+\)\+\$' may never end",
    ),
    "a long expression": ({"pre_tokenizer": rule("Split", pattern={"Regex": "a" * 10_001}, **SPLIT)}, "may never end"),
}


@pytest.mark.parametrize("place", ["usual", "behind the vocabulary", "in disguise"])
@pytest.mark.parametrize("name", HOSTILE)
def test_rules_that_flood_or_never_end_are_refused_before_they_run(directory, name, place):
    parts, message = HOSTILE[name]
    raw = json.loads((directory / "tokenizer.json").read_text()) | parts
    if place != "usual":
        raw = {"model": raw.pop("model"), **raw}
    text = json.dumps(raw)
    if place == "in disguise":
        text = text.replace('"normalizer"', '"norm\\u0061lizer"').replace('"decoder"', '"d\\u0065coder"')
        text = text.replace('"pre_tokenizer"', '"pr\\u0065_tokenizer"')
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[1]", "null", "[" * 100_000, '{"a":' * 100_000, "\x00"])
def test_a_file_that_is_none_is_one_line(directory, content):
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer") as error:
        load_tokenizer(directory)
    assert "\n" not in str(error.value)


def test_a_panic_of_the_library_is_one_line(capsys):
    PanicException = type("PanicException", (BaseException,), {})

    def panics():
        raise PanicException("Onig: Regex search error:\nretry-limit-in-match over")

    assert exit_code(panics) == 2
    assert capsys.readouterr().err == (
        "error: the model's tokenizer does not take a text: Onig: Regex search error: retry-limit-in-match over\n"
    )
    with pytest.raises(GeneratorExit):
        exit_code(lambda: (_ for _ in ()).throw(GeneratorExit))
