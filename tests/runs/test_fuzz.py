"""Drawn inputs, the same each time, at every way in: each is used, or refused in one line, and nobody's file changes.

The long tier (``--long``) draws 3,500; without it a few of each kind run. ``-s`` shows how many of each were used and
refused. A case that takes more than ten seconds fails.
"""

import json
import struct
import warnings
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stablelora_jax
from stablelora_jax import InputError, LoraSpec, base_directory, config, init_adapters, load_peft, save_peft
from stablelora_jax.config.run import JsonlTask, RunConfig
from stablelora_jax.data import encode_chat
from stablelora_jax.data.tasks import load_questions
from stablelora_jax.generation.generate import encode_prompts
from stablelora_jax.models.pretrained.load import load_pretrained, save_pretrained
from stablelora_jax.runs.curves import read_curves
from stablelora_jax.runs.directory import locate
from stablelora_jax.training import checkpoint
from stablelora_jax.utils.errors import RunError
from stablelora_jax.utils.outputs import new_file
from tests.helpers import tiny_decoder
from tests.utils.test_outputs import snapshot

ENDS = defaultdict(Counter)
EVERY = {"few": 5, "many": 250}
TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\0", "~", "..", "/", "a\nb", "\ud800", "nan", "null", "true", "1e999", "[", "{{", "(a+)+$"]
    ),
)
NUMBER = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**63, 1e300, -0.0]))
SCALAR = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)


@pytest.fixture(params=["few", pytest.param("many", marks=pytest.mark.soak)])
def drawn(request):
    """Run a check on drawn values: ``drawn(kind, check, strategy...)``."""

    def run(kind, check, *strategies):
        @settings(
            max_examples=EVERY[request.param],
            derandomize=True,
            deadline=10_000,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.tuples(*strategies))
        def one(values):
            try:
                check(*values)
                ENDS[kind]["used"] += 1
            except (InputError, RunError) as error:
                ENDS[kind]["refused"] += 1
                assert "\n" not in str(error) and str(error).strip() and len(str(error)) < 2000, str(error)[:300]

        one()
        print(f"\n{kind}: {dict(ENDS[kind])}")

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny model, and one with an adapter for it."""
    place = tmp_path_factory.mktemp("model")
    own, params = tiny_decoder()
    save_pretrained(place / "base", own, params)
    adapters = init_adapters(jax.random.key(0), params, LoraSpec(rank=2))
    save_peft(place / "adapter", adapters, LoraSpec(rank=2), params=params)
    return place, params


def keys(cls, prefix=""):
    """Every key of a configuration, and what is almost one."""
    return [f.name for f in fields(cls)]


def test_configurations(drawn, tmp_path):
    names = st.one_of(st.sampled_from(keys(RunConfig)), TEXT)
    lora = st.dictionaries(st.sampled_from(keys(LoraSpec)), VALUE, max_size=3)

    def check(raw, own, text):
        path = tmp_path / "c.yaml"
        try:
            dumped = yaml.safe_dump(raw | ({"lora": own} if own else {}), allow_unicode=True) + text
        except (yaml.YAMLError, UnicodeError):
            dumped = text
        path.write_bytes(dumped.encode("utf-8", "surrogatepass"))
        config.load(RunConfig, path)

    drawn(
        "configuration",
        check,
        st.dictionaries(names, VALUE, max_size=4),
        lora,
        st.sampled_from(["", "\n&a ? *a\n", "x"]),
    )


def test_overrides(drawn):
    key = st.sampled_from(
        [*keys(RunConfig), "lora.rank", "lora.target_modules", "task.name", "optimizer.b1", "schedule.end", "x"]
    )
    value = st.one_of(TEXT, VALUE.map(lambda v: json.dumps(v, default=str)))
    drawn("override", lambda k, v: config.load(RunConfig, None, [f"{k}={v}"]), key, value)


def test_specs(drawn, model):
    _, params = model
    spec = st.dictionaries(st.sampled_from(keys(LoraSpec)), VALUE, max_size=3)
    drawn("spec", lambda given: init_adapters(jax.random.key(0), params, LoraSpec(**given)), spec)


def test_directories_of_runs(drawn, tmp_path_factory):
    name = st.sampled_from(
        [
            "config.yaml",
            "metrics.jsonl",
            ".lock",
            "summary.json",
            "adapter/x",
            "checkpoints/2021/x",
            "loss.png",
            "x",
            "2/y",
        ]
    )
    content = st.sampled_from(["", "x", "seed: 3\n", "# mine\n", '{"step": 1}\n', "process 1 on x", "\x00", "[1]"])

    def check(files, accept):
        place = tmp_path_factory.mktemp("d")
        for own, text in files.items():
            (place / own).parent.mkdir(exist_ok=True, parents=True)
            (place / own).write_text(text)
        before = snapshot(place)
        try:
            locate(RunConfig(output=str(place), accept_changes=accept))
            assert set(before) <= {".lock"}, "not a run's, and not empty"
        finally:
            assert snapshot(place) == before

    drawn("run directory", check, st.dictionaries(name, content, max_size=4), st.booleans())


def test_directories_of_checkpoints(drawn, tmp_path_factory):
    name = st.sampled_from(
        [
            "1",
            "7",
            "2021",
            "0008",
            "\u0663",
            "-1",
            "1.5",
            "5.orbax-checkpoint-tmp",
            "x.orbax-checkpoint-tmp-3",
            "photos",
        ]
    )
    inside = st.sampled_from(
        ["a", "about", "state", "about/metadata2", "photo.jpg", "default/x", "_CHECKPOINT_METADATA"]
    )

    def check(files, step):
        place = tmp_path_factory.mktemp("c")
        for folder, file in files:
            with suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
                (place / folder / file).parent.mkdir(exist_ok=True, parents=True)
                (place / folder / file).write_text("a user's")
        before = {k: v for k, v in snapshot(place).items() if "photo" in k or k.endswith("/a")}
        try:
            checkpoint.save(place, step, {"a": np.ones(2)})
        finally:
            assert before.items() <= snapshot(place).items()

    drawn("checkpoints", check, st.lists(st.tuples(name, inside), max_size=3), st.sampled_from([1, 7, 3000, True, -1]))


def test_configs_of_models(drawn, model, tmp_path):
    place, _ = model
    raw = json.loads((place / "base/config.json").read_text())
    for file in (place / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def check(changes):
        (tmp_path / "config.json").write_text(json.dumps(raw | changes))
        load_pretrained(tmp_path)

    small = st.one_of(st.none(), st.booleans(), st.integers(-3, 64), st.floats(-2, 2), TEXT, VALUE)
    drawn("config.json", check, st.dictionaries(st.one_of(st.sampled_from(sorted(raw)), TEXT), small, max_size=2))


def test_headers_of_weights(drawn, model, tmp_path):
    place, _ = model
    content = (place / "base/model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for file in (place / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "X", ""]),
            "shape": st.lists(NUMBER, max_size=3),
        },
        optional={"data_offsets": st.lists(NUMBER, max_size=3)},
    )

    def check(changes, length, cut):
        text = json.dumps(header | changes).encode()
        whole = struct.pack("<Q", len(text) if length is None else length) + text + data
        (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) - cut])
        load_pretrained(tmp_path)

    name = st.one_of(st.sampled_from(sorted(header)), TEXT)
    length = st.one_of(st.none(), st.none(), st.integers(0, 2**64 - 1))
    drawn(
        "weights",
        check,
        st.dictionaries(name, st.one_of(entry, VALUE), max_size=2),
        length,
        st.sampled_from([0, 0, 1, 99]),
    )


def test_adapters(drawn, model, tmp_path):
    place, params = model
    raw = json.loads((place / "adapter/adapter_config.json").read_text())
    for file in (place / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def check(changes, record):
        (tmp_path / "adapter_config.json").write_text(json.dumps(raw | changes))
        (tmp_path / "stablelora.json").write_text(json.dumps({"written_by": "x", "base": record}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that match nothing, and of another base
            load_peft(tmp_path, params)

    drawn("adapter", check, st.dictionaries(st.one_of(st.sampled_from(sorted(raw)), TEXT), VALUE, max_size=2), VALUE)


def test_rows(drawn, tmp_path):
    names = "prompt completion messages conversations tools instruction output choices label id text"
    columns = st.sampled_from(names.split())
    row = st.dictionaries(columns, VALUE, max_size=4).map(lambda v: json.dumps(v, default=str).encode())
    lines = st.lists(st.one_of(row, st.binary(max_size=12), st.just(b""), st.just(b"\xef\xbb\xbf")), max_size=4)

    def check(kind, given):
        (tmp_path / "train.jsonl").write_bytes(b"\n".join(given))
        load_questions(JsonlTask(path=str(tmp_path), kind=kind), "train")

    drawn("rows", check, st.sampled_from(["choice", "completion", "chat", "text", "auto"]), lines)


def test_chats(drawn):
    own, _ = load_pretrained(base_directory())
    own.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    fields = {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": VALUE}
    message = st.one_of(VALUE, st.fixed_dictionaries(fields, optional={"tool_calls": VALUE, "reasoning": VALUE}))
    drawn(
        "chats",
        lambda messages, tools: encode_chat(own.tokenizer, messages, tools=tools),
        st.one_of(VALUE, st.lists(message, max_size=4)),
        VALUE,
    )


def test_logs(drawn, tmp_path):
    record = st.dictionaries(
        st.sampled_from(
            ["step", "loss", "learning_rate", "validation", "stopped", "stability", "skipped", "norm_a", "data"]
        ),
        VALUE,
        max_size=5,
    )

    def check(records, tail):
        text = "".join(json.dumps(one) + "\n" for one in records).encode("utf-8", "surrogatepass")
        (tmp_path / "metrics.jsonl").write_bytes(text + tail)
        read_curves(tmp_path)

    drawn("log", check, st.lists(record, max_size=4), st.binary(max_size=20))


def test_prompts(drawn):
    own, _ = load_pretrained(base_directory())
    own.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    message = st.one_of(VALUE, st.fixed_dictionaries({"role": SCALAR, "content": VALUE}))
    prompt = st.one_of(VALUE, st.lists(st.integers(-5, 2**40), max_size=4), st.lists(message, max_size=3))
    drawn("prompts", lambda given: encode_prompts(own.tokenizer, given), st.one_of(VALUE, st.lists(prompt, max_size=3)))


def test_outputs(drawn, tmp_path):
    (tmp_path / "mine").write_text("mine")
    part = st.sampled_from(["mine", "..", ".", "new", "a b", "x" * 300, "\0", "~", "\ud800", ""])

    def check(parts):
        before = snapshot(tmp_path)
        try:
            with new_file(f"{tmp_path}/" + "/".join(parts)):
                raise RunError("far enough")
        finally:
            assert snapshot(tmp_path) == before

    drawn("output", check, st.lists(part, max_size=4))


def test_arguments(drawn, model):
    _, params = model
    spec = LoraSpec(rank=2)
    adapters = init_adapters(jax.random.key(0), params, spec)
    good = {"params": params, "adapters": adapters, "spec": spec}
    calls = {
        "merge": ("params", "adapters", "spec"),
        "describe": ("params", "adapters", "spec"),
        "lora_hyperparams": ("spec", "adapters"),
        "freeze_mask": ("params", "adapters", "spec"),
    }

    def check(name, number, wrong):
        arguments = {key: good[key] for key in calls[name]}
        arguments[calls[name][number % len(calls[name])]] = wrong
        more = {"patterns": ["lora_a"]} if name == "freeze_mask" else {}
        getattr(stablelora_jax, name)(**arguments, **more)

    drawn("argument", check, st.sampled_from(sorted(calls)), st.integers(0, 2), VALUE)


def test_files_of_ggufs(drawn, tmp_path):
    pytest.importorskip("gguf")
    from tests.models.gguf_files import hf_tensors, write
    from tests.runs.damage import GGUF_TOKENIZER

    write(tmp_path / "whole.gguf", hf_tensors(), keys=GGUF_TOKENIZER)
    whole = (tmp_path / "whole.gguf").read_bytes()

    def check(places, content, cut):
        damaged = bytearray(whole)
        for place in places:
            at = place % min(len(whole), 4096)
            damaged[at : at + len(content)] = content
        (tmp_path / "m.gguf").write_bytes(damaged[: len(damaged) - cut])
        load_pretrained(Path(tmp_path / "m.gguf"))

    drawn(
        "gguf",
        check,
        st.lists(st.integers(0, 2**16), max_size=3),
        st.binary(min_size=1, max_size=8),
        st.sampled_from([0, 0, 9]),
    )
