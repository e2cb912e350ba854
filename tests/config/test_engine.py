"""stablelora_jax.config.engine: what is read, what is refused in which words, and that a dump reads back."""

import string
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from stablelora_jax.config import REQUIRED, Section, dump, help_text, load, option, section, to_dict
from stablelora_jax.utils.errors import InputError


@dataclass(frozen=True)
class Spec:
    """Stands for a dataclass that knows nothing of our module; keeps its mapping hashable, as LoraSpec does."""

    rank: int = 8
    alpha: float = field(default=16.0, metadata={"unit": "none"})
    target: str | tuple[str, ...] = ("q_proj", "v_proj")
    pairs: tuple[tuple[str, int], ...] = ()
    pattern: Mapping[str, int] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1,\n  not {self.rank}")
        object.__setattr__(self, "pattern", tuple(dict(self.pattern).items()))


@dataclass(frozen=True)
class StableLora:
    name: Literal["stable_lora"] = "stable_lora"
    learning_rate: float = option(1e-4, "step size")
    shrink: float = option(0.5, "factor on A")


@dataclass(frozen=True)
class AdamW:
    name: Literal["adamw"]  # without a default
    learning_rate: float = option(1e-3, "step size")
    decay: float = option(0.0, "decoupled decay")


@dataclass(frozen=True)
class Eval:
    batch: int = option(4, "rows per step")


@dataclass(frozen=True)
class Train:
    seed: int = option(0, "of everything random")
    run: str | None = option(None, "what the run is called")
    clip: float | None = option(1.0, "largest gradient norm")
    verbose: bool = option(False, "say more")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the frozen weights")
    steps: int | Literal["auto"] = option("auto", "of the optimizer")
    scale: float | str = option(1.0, "a number or a name")
    weights: dict[str, float] = option({"a": 1.0}, "of the tasks")
    shape: tuple[int, str] = option((1, "x"), "a fixed pair")
    lora: Spec = section(Spec, "the adapter")
    optimizer: StableLora | AdamW = section(StableLora, "the update rule")
    eval: Eval | None = option(None, "evaluation while training")
    evals: tuple[Eval, ...] = option((), "more of them")


@dataclass(frozen=True)
class Model:
    path: str = option(REQUIRED, "the folder")


@dataclass(frozen=True, kw_only=True)
class Needs:
    size: int
    model: Model = section(Model, "the base model")
    opt: StableLora | AdamW | None = option(None, "an update rule")
    must: StableLora | AdamW = option(REQUIRED, "another")
    maybe: Eval | None = option(REQUIRED, "to be said, if only null")


@dataclass(frozen=True)
class Swap:
    level: Literal[0, 1] = option(0, "how much")
    unnamed: StableLora | AdamW = section(AdamW, "a default whose name has no default")


def read(tmp_path, text, overrides=(), cls=Train):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(cls, path, overrides)


def value(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


GOOD = [
    ("seed: 3", "seed", 3),
    ("seed: 0x10", "seed", 16),
    ("clip: 1e-4", "clip", 1e-4),
    ("clip: -1.5E3", "clip", -1500.0),
    ("clip: .5e1", "clip", 5.0),
    ("clip: 2", "clip", 2.0),
    ("clip: null", "clip", None),
    ("clip:", "clip", None),
    ("verbose: yes", "verbose", True),
    ("verbose: off", "verbose", False),
    ("run: hello", "run", "hello"),
    ("run: '8'", "run", "8"),
    ("run: '1e-4'", "run", "1e-4"),
    ("run: 2026-01-31", "run", "2026-01-31"),
    ("dtype: bfloat16", "dtype", "bfloat16"),
    ("steps: 100", "steps", 100),
    ("steps: auto", "steps", "auto"),
    ("scale: 1e-4", "scale", 1e-4),
    ("scale: '1e-4'", "scale", "1e-4"),
    ("weights: {b: 2, c: 3e-1}", "weights", {"b": 2.0, "c": 0.3}),
    ("weights: {}", "weights", {}),
    ("shape: [2, y]", "shape", (2, "y")),
    ("lora: {target: all-linear}", "lora.target", "all-linear"),
    ("lora: {target: [a, b]}", "lora.target", ("a", "b")),
    ("lora: {pairs: [[q, 4], [a, 2]]}", "lora.pairs", (("q", 4), ("a", 2))),
    ("lora: {alpha: 1}", "lora", Spec(alpha=1.0)),
    ("lora:", "lora.rank", 8),
    ("eval:", "eval", None),
    ("eval: {}", "eval", Eval()),
    ("eval: {batch: 2}", "eval.batch", 2),
    ("evals: [{batch: 2}, {}]", "evals", (Eval(2), Eval(4))),
    ("optimizer: {shrink: 0.25}", "optimizer", StableLora(shrink=0.25)),
    ("optimizer: {name: adamw, decay: 1}", "optimizer", AdamW("adamw", decay=1.0)),
    ("lora: {<<: {rank: 2, alpha: 3}, rank: 4}", "lora", Spec(4, 3.0)),
    ("\ufeffseed: 3", "seed", 3),
]


@pytest.mark.parametrize("text, key, wanted", GOOD)
def test_good_file(tmp_path, text, key, wanted):
    got = value(read(tmp_path, text), key)
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "null"])
def test_empty_file_is_all_defaults(tmp_path, text):
    assert read(tmp_path, text) == load(Train) == Train()


OVERRIDES = [
    ("", ["seed=3", "seed=4"], "seed", 4),
    ("seed: x", ["seed=y", "seed=4"], "seed", 4),  # a value that is replaced is not read
    ("seed: 1", ["seed=3"], "seed", 3),
    ("", ["optimizer.learning_rate=3e-4"], "optimizer.learning_rate", 3e-4),
    ("", [" seed = 3"], "seed", 3),
    ("", ["run=a=b"], "run", "a=b"),
    ("run: x", ["run="], "run", None),
    ("", ['run="8"'], "run", "8"),
    ("", ["lora.target=[q_proj,v_proj]"], "lora.target", ("q_proj", "v_proj")),
    ("lora: {pattern: {a: 1}}", ["lora.pattern={q_proj: 4}"], "lora.pattern", (("q_proj", 4),)),
    ("weights: {b: 2}", ["weights={c: 3}"], "weights", {"c": 3.0}),
    ("lora: {alpha: 1}", ["lora={rank: 2}"], "lora", Spec(2, 1.0)),
    ("eval: {batch: 2}", ["eval=null"], "eval", None),
    ("eval:", ["eval.batch=3"], "eval.batch", 3),
    ("", ["eval.batch=3", "eval=", "eval.batch=5"], "eval.batch", 5),
    ("optimizer: {shrink: 0.25}", ["optimizer.name=adamw"], "optimizer", AdamW("adamw")),
    ("optimizer: {learning_rate: 9}", ["optimizer={name: adamw}"], "optimizer", AdamW("adamw")),
    ("optimizer: {shrink: 0.25}", ["optimizer.name=stable_lora"], "optimizer", StableLora(shrink=0.25)),
    ("optimizer: {name: adamw, decay: 1}", ["optimizer.name=stable_lora"], "optimizer", StableLora()),
    ("optimizer: {name: adamw, decay: 1}", ["optimizer.learning_rate=2"], "optimizer", AdamW("adamw", 2.0, 1.0)),
    ("", ["optimizer.decay=2", "optimizer.name=adamw"], "optimizer", AdamW("adamw", decay=2.0)),  # in either order
    ("", ["optimizer.name=adamw", "optimizer.decay=2"], "optimizer", AdamW("adamw", decay=2.0)),
]


@pytest.mark.parametrize("text, overrides, key, wanted", OVERRIDES)
def test_good_override(tmp_path, text, overrides, key, wanted):
    assert value(read(tmp_path, text, overrides), key) == wanted


BAD = [  # file, overrides, what the message says after its source (the file, or the override itself)
    ("sed: 3", [], "sed is not a key (did you mean seed?)"),
    ("optimizer: {learning_rat: 3}", [], "optimizer.learning_rat is not a key (did you mean optimizer.learning_rate?)"),
    ("learning_rate: 3", [], "learning_rate is not a key (did you mean optimizer.learning_rate?)"),
    ("batch: 3", [], "batch is not a key (did you mean eval.batch?)"),
    ("decay: 3", [], "decay is not a key (did you mean optimizer.decay?)"),
    ("1: 3", [], "1 is not a key (Train has seed, run, "),
    ("optimizer: {decay: 3}", [], "optimizer.decay is not a key of optimizer.name=stable_lora, but of adamw"),
    ("seed: 1.5", [], "seed wants int, got 1.5"),
    ("seed: 2.0", [], "seed wants int, got 2.0"),
    ("seed: 1e3", [], "seed wants int, got 1000.0"),
    ("seed: yes", [], "seed wants int, got true"),
    ("seed:", [], "seed wants int, got null"),
    ("seed: '3'", [], "seed wants int, got '3'"),
    ("verbose: 1", [], "verbose wants bool, got 1"),
    ("clip: true", [], "clip wants float | null, got true"),
    ("clip: '0.5'", [], "clip wants float | null, got '0.5'"),
    ("lora: {alpha: .nan}", [], "lora.alpha wants a finite float, got nan"),
    ("lora: {alpha: -.inf}", [], "lora.alpha wants a finite float, got -inf"),
    ("lora: {alpha: 1e999}", [], "lora.alpha wants a finite float, got inf"),
    ("lora: {alpha: 1" + "0" * 400 + "}", [], "lora.alpha wants float, got 1000"),
    ("run: 8", [], 'run wants str | null, got 8 (as text: "8", quotes included)'),
    ("dtype: float16", [], "dtype wants float32 | bfloat16, got 'float16'"),
    ("dtype: [a]", [], "dtype wants float32 | bfloat16, got ['a']"),
    ("steps: 1.5", [], "steps wants int | auto, got 1.5"),
    ("weights: {a: x}", [], "weights.a wants float, got 'x'"),
    ("weights: {1: 2}", [], "weights: its key wants str, got 1"),
    ("weights: [1]", [], "weights wants {str: float}, got [1]"),
    ("shape: [1]", [], "shape wants [int, str], got [1]"),
    ("shape: {1: x, 2: y}", [], "shape wants [int, str], got {1: 'x', 2: 'y'}"),
    ("shape: [1, 2]", [], "shape wants [int, str], got [1, 2]"),
    ("lora: {target: 3}", [], "lora.target wants str | [str, ...], got 3"),
    ("lora: {pairs: [[a, b]]}", [], "lora.pairs[0] wants [str, int], got ['a', 'b']"),
    ("lora: {pairs: a}", [], "lora.pairs wants [[str, int], ...], got 'a'"),
    ("evals: [{batch: x}]", [], "evals[0] wants Eval, got {'batch': 'x'}"),
    ("lora: 3", [], "lora holds keys (rank, alpha, target, pairs, pattern), not 3"),
    ("lora: {rank: 0}", [], "lora: rank must be at least 1, not 0"),
    ("optimizer: {name: adam}", [], "optimizer.name wants stable_lora | adamw, got 'adam'"),
    ("optimizer: {name: }", [], "optimizer.name wants stable_lora | adamw, got null"),
    ("optimizer: [adamw]", [], "optimizer holds keys (name, learning_rate, shrink), not ['adamw']"),
    ("[1]", [], "the top level holds keys (seed, run, "),
    ("hello", [], "the top level holds keys (seed, run, "),
    ("seed: 1\nrun: a\nseed: 2", [], "not valid YAML in line 3: 'seed' is given twice: keep one"),
    ("lora:\n  rank: 1\n  rank: 1", [], "not valid YAML in line 3: 'rank' is given twice: keep one"),
    ("seed: 1\nlora: [", [], "not valid YAML in line 2: "),
    ("seed: 1\n\trun: 3", [], "not valid YAML in line 2: "),
    ("seed: 1\n---\nseed: 2", [], "not valid YAML in line 2: expected a single document"),
    ("seed: !!python/name:os.system x", [], "not valid YAML in line 1: "),
    ("seed: !!int x", [], "not valid YAML: "),
    ("seed: !!bool x", [], "not valid YAML: "),
    ("seed: !!timestamp x", [], "not valid YAML: "),
    ("seed: !!timestamp\n  =: x", [], "not valid YAML: "),
    ("[" * 1000, [], "not valid YAML: "),
    ("seed: \0", [], "not valid YAML: "),
    (b"run: \xff\xfe", [], "'utf-8' codec can't decode byte 0xff"),
    ("", ["seed"], "an override is KEY=VALUE, such as seed=3"),
    ("", ["=3"], "an override is KEY=VALUE, such as seed=3"),
    ("", ["--seed=3"], "--seed is not a key (did you mean seed?)"),
    ("seed: 1", ["optimizer.learning_rat=3"], "optimizer.learning_rat is not a key (did you mean optimizer.learning_r"),
    ("", ["seed.x=3"], "seed.x is not a key: set all of seed, which is int"),
    ("", ["lora.pattern.q=3"], "lora.pattern.q is not a key: set all of lora.pattern, which is {str: int}"),
    ("", ["lora=3"], "lora holds keys (rank, alpha, target, pairs, pattern), not 3"),
    ("lora: {rank: 2}", ["lora="], "lora holds keys (rank, alpha, target, pairs, pattern), not null"),
    ("", ["eval=3"], "eval holds keys (batch), not 3"),
    ("", ["lora.target=[q"], "not valid YAML in line 1: "),
    ("lora: {rank: 4}", ["seed=x"], "seed wants int, got 'x'"),
    (
        "optimizer: {name: adamw}",
        ["optimizer.shrink=1"],
        "optimizer.shrink is not a key of optimizer.name=adamw, but",
    ),
    ("", ["optimizer.name=adam"], "optimizer.name wants stable_lora | adamw, got 'adam'"),
]


@pytest.mark.parametrize("text, overrides, message", BAD)
def test_bad_input_is_one_line_that_names_it(tmp_path, text, overrides, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, overrides)
    source = overrides[0] if overrides else str(tmp_path / "x.yaml")
    assert str(caught.value).startswith(f"{source}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_refused_section_names_the_file_and_the_overrides_it_was_made_of(tmp_path):
    with pytest.raises(InputError) as caught:
        read(tmp_path, "lora: {alpha: 2}", ["seed=1", "lora.rank=0"])
    assert str(caught.value) == f"{tmp_path / 'x.yaml'} lora.rank=0: lora: rank must be at least 1, not 0"


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match=r"nope\.yaml: No such file or directory: name a YAML file"):
        load(Train, tmp_path / "nope.yaml")
    with pytest.raises(InputError, match=rf"^{tmp_path}: Is a directory: name a YAML file"):
        load(Train, str(tmp_path))


def test_missing_keys(tmp_path):
    for text, message in {
        "": "size is missing: set it in the file, or with size=VALUE (type int)",
        "{size: 1, must: {name: adamw}, maybe: null}": "model.path is missing: set it in the file, "
        "or with model.path=VALUE (type str)",
        "{size: 1, model: {path: x}}": "must is missing: set it in the file, or with must=VALUE "
        "(type StableLora | AdamW)",
        "{size: 1, model: {path: x}, must: {decay: 1}, maybe: null}": "must.name wants stable_lora | adamw, got null",
        "{size: 1, model: {path: x}, must: {name: adamw}}": "maybe is missing: set it in the file, or with maybe=VALUE "
        "(type Eval | null)",
    }.items():
        with pytest.raises(InputError) as caught:
            read(tmp_path, text, cls=Needs)
        assert str(caught.value) == f"{tmp_path / 'x.yaml'}: {message}"
    config = load(Needs, None, ["size=1", "model.path=x", "must.name=adamw", "opt.name=stable_lora", "maybe="])
    assert config == Needs(size=1, model=Model("x"), opt=StableLora(), must=AdamW("adamw"), maybe=None)


def test_defaults_of_unions():
    assert load(Swap) == Swap(0, AdamW("adamw"))
    assert load(Swap, None, ["unnamed.decay=1"]) == Swap(0, AdamW("adamw", decay=1.0))
    assert load(Swap, None, ["unnamed.name=stable_lora"]).unnamed == StableLora()
    with pytest.raises(InputError, match="level wants 0 | 1, got true"):
        load(Swap, None, ["level=yes"])


def test_results_are_hashable_and_mappings_are_plain():
    assert hash(load(Spec, None, ["target=[a]", "pairs=[[a, 1]]"])) == hash(Spec(target=("a",), pairs=(("a", 1),)))
    assert type(load(Train).weights) is dict
    assert load(Train).weights is not load(Train).weights


def test_to_dict_keeps_the_order_and_has_only_yaml_types():
    config = load(Train, None, ["lora.pattern={q: 4}", "lora.pairs=[[q, 4]]", "eval.batch=2"])
    plain = to_dict(config)
    assert list(plain) == list(Train.__dataclass_fields__)
    assert plain["lora"] == {
        "rank": 8, "alpha": 16.0, "target": ["q_proj", "v_proj"], "pairs": [["q", 4]], "pattern": {"q": 4}
    }  # fmt: skip
    assert plain["eval"] == {"batch": 2} and plain["optimizer"]["name"] == "stable_lora"
    assert [line.split(":")[0] for line in dump(config).splitlines() if line[0] not in " -"] == list(plain)


floats = st.floats(allow_nan=False, allow_infinity=False)
words = st.one_of(st.text(), st.sampled_from(["1e-4", "yes", "null", "8", "2026-01-31", "=", "<<", "~", " ", "1_0e5"]))
configs = st.builds(
    Train,
    seed=st.integers(),
    run=st.none() | words,
    clip=st.none() | floats,
    verbose=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    steps=st.integers() | st.just("auto"),
    scale=floats | words,
    weights=st.dictionaries(words, floats, max_size=3),
    shape=st.tuples(st.integers(), words),
    lora=st.builds(
        Spec,
        rank=st.integers(min_value=1),
        alpha=floats,
        target=words | st.lists(words, max_size=3).map(tuple),
        pairs=st.lists(st.tuples(words, st.integers()), max_size=3).map(tuple),
        pattern=st.dictionaries(words, st.integers(), max_size=3),
    ),
    optimizer=st.builds(StableLora, learning_rate=floats) | st.builds(AdamW, name=st.just("adamw"), decay=floats),
    eval=st.none() | st.builds(Eval, batch=st.integers()),
    evals=st.lists(st.builds(Eval, batch=st.integers()), max_size=2).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(configs)
def test_dump_reads_back(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(Train, path) == config


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=string.printable) | st.text(), st.text(alphabet="=:{}[]&*!|>'\"%@`-?, \n\tab.0xe"))
def test_any_text_loads_or_is_refused_in_one_line(tmp_path_factory, text, override):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    for overrides in ((), ["run=" + override], ["weights=" + override], [override]):
        try:
            load(Train, path if not overrides else None, overrides)
        except InputError as error:
            assert len(str(error).splitlines()) == 1


def test_help_is_a_screen_that_leads_to_pages():
    lines = help_text(Train).splitlines()
    rows = [line.split() for line in lines]
    for row in (
        "seed 0 of everything random",
        "run null what the run is called",
        "verbose false say more",
        "weights {a: 1.0} of the tasks",
        "lora the adapter",
        "optimizer the update rule (picked by name)",
        "eval evaluation while training",
    ):
        assert row.split() in rows
    assert any("--help NAME" in line for line in lines) and max(map(len, lines)) <= 100
    assert "size (required)" in " ".join(help_text(Needs).split())


def test_help_on_a_section_and_on_a_key():
    lora = help_text(Train, "lora").splitlines()
    assert lora[0] == "lora: the adapter" and "  lora.target: str | [str, ...] = [q_proj, v_proj]" in lora
    assert "  lora.pattern: {str: int} = {}" in lora
    members = help_text(Train, "optimizer")
    assert "stable_lora: StableLora(" in members and "(the default)" in members and "adamw: " in members
    adamw = help_text(Train, "optimizer.adamw")
    assert "  optimizer.decay: float = 0.0\n      decoupled decay\n" in adamw and "shrink" not in adamw
    assert help_text(Train, "eval.batch") == "  eval.batch: int = 4\n      rows per step\n"
    assert help_text(Train, "dtype") == "  dtype: float32 | bfloat16 = float32\n      of the frozen weights\n"
    assert "  model.path: str = (required)\n      the folder\n" in help_text(Needs, "model")
    assert "  rows: int at least 1 and below 100 = 4\n" in help_text(Bounded, "rows")
    assert "  share: float above 0 and at most 1 | null = null\n" in help_text(Bounded, "share")


@pytest.mark.parametrize("name, near", {"optimiser": "optimizer", "optimizer.adam": "optimizer.adamw"}.items())
def test_help_on_nothing_names_what_is_near(name, near):
    with pytest.raises(InputError, match=rf"no help on '{name}' \(did you mean {near}\?"):
        help_text(Train, name)


def test_help_is_wrapped():
    @dataclass(frozen=True)
    class Wordy:
        choice: Literal["alpha", "beta", "gamma", "delta", "epsilon"] = option("alpha", "which one " * 20)
        layers: tuple[str, ...] = option(tuple(f"layer{i}" for i in range(30)), "all of them")

    for page in (help_text(Wordy), help_text(Wordy, "choice"), help_text(Wordy, "layers")):
        assert max(map(len, page.splitlines())) <= 100
    assert help_text(Wordy, "choice").split().count("which") == 20
    assert all(f"layer{i}" in help_text(Wordy, "layers") for i in range(30))


@dataclass(frozen=True)
class Bounded(Section):
    rows: Annotated[int, Meta(ge=1, lt=100)] = option(4, "rows per step")
    share: Annotated[float, Meta(gt=0, le=1)] | None = option(None, "of the rows")
    points: Mapping[int, Annotated[float, Meta(ge=0)]] = option({}, "by step")
    rule: StableLora | AdamW = section(StableLora, "the update rule")
    length: int = option(8, "tokens per row", was="size")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(rows=0), "rows must be at least 1 and below 100, not 0"),
        (dict(rows=100), "rows must be at least 1 and below 100, not 100"),
        (dict(rows=2.0), "rows wants int, got 2.0"),
        (dict(rows=True), "rows wants int, got true"),
        (dict(share=0), "share must be above 0 and at most 1 or null, not 0"),
        (dict(share=float("nan")), "share wants a finite float | null, got nan"),
        (dict(points={3: -1.0}), "points.3 must be at least 0, not -1.0"),
        (dict(points={"a": 1.0}), "points: its key wants int, got 'a'"),
        (dict(rule={"name": "adam"}), "rule.name wants stable_lora | adamw, got 'adam'"),
        (dict(rule={"decay": 1}), "rule.decay is not a key of rule.name=stable_lora, but of adamw"),
        (dict(rule={"learning_rate": "x"}), "rule.learning_rate wants float, got 'x'"),
        (dict(rule=3), "rule holds keys (name, learning_rate, shrink), not 3"),
        (dict(size=3), "Bounded: size is now called length"),
    ],
)
def test_a_range_and_a_section_made_in_python(given, message):
    with pytest.raises(InputError) as caught:
        Bounded(**given)
    assert str(caught.value) == message
    if given != {"size": 3}:
        with pytest.raises(InputError) as caught:
            load(Bounded, None, [f"{key}={yaml.safe_dump(given[key]).strip()}" for key in given])
        assert str(caught.value).endswith(message)
    assert Bounded(rule={"name": "adamw", "decay": 2}, points={3: 1}).rule == AdamW("adamw", decay=2.0)


def laughs(merge=False, count=12):
    """Each anchor stands for nine of the one before."""
    first = "a0: &a0 {seed: 1}\n" if merge else "a0: &a0 [x, x]\n"
    lines = []
    for i in range(1, count):
        parts = f"[{', '.join([f'*a{i - 1}'] * 9)}]"
        lines.append(f"a{i}: &a{i} {{<<: {parts}}}\n" if merge else f"a{i}: &a{i} {parts}\n")
    return first + "".join(lines)


BOMBS = {
    "values": (laughs(), "its aliases stand for more than 100000 values"),
    "merges of 8 levels": (laughs(merge=True, count=9), "its aliases stand for more than 100000 values"),
    "merges of 12 levels": (laughs(merge=True), "its aliases stand for more than 100000 values"),
    "key": ("? [&a [x, x], *a]\n: 1", "a key must be plain text"),
    "key of anchors": (laughs(count=8) + "? *a7\n: 1\n", "a key must be plain text"),
    "map in itself": ("lora: &a {pattern: *a}", "an alias stands for what it lies in"),
    "list in itself": ("evals: &a [*a]", "an alias stands for what it lies in"),
    "deep lists": ("seed: " + "[" * 50_000, "more than 100 values lie in each other"),
    "deep maps": ("seed: " + "{a: " * 5000, "more than 100 values lie in each other"),
    "many keys": ("".join(f"k{i}: {i}\n" for i in range(60_000)), "it holds more than 50000 values"),
    "digits of base 60": ("seed: 1" + ":1" * 200_000, "a number of more than 1000 digits"),
}


@pytest.mark.parametrize("text, message", BOMBS.values(), ids=BOMBS)
def test_a_bomb_ends_in_one_short_line(tmp_path, text, message):
    start = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text)
    assert time.monotonic() - start < 10 and len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "override, message",
    [
        ("lora={? [&a [x, x], *a] : 1}", "a key must be plain text"),
        ("evals=&a [*a]", "an alias stands for what it lies in"),
        ("lora=&a {pattern: *a}", "an alias stands for what it lies in"),
        ("seed=" + "[" * 50_000, "more than 100 values lie in each other"),
        ("seed=1" + ":1" * 200_000, "a number of more than 1000 digits"),
        ("evals=[" + "1," * 60_000 + "]", "it holds more than 50000 values"),
    ],
    ids=range(6),
)
def test_a_bomb_in_an_override_ends_in_one_short_line(tmp_path, override, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, "", [override])
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("source", ["file", "override"])
def test_a_long_text_is_refused(tmp_path, source):
    text = "x" * 2**20
    with pytest.raises(InputError, match="1048576") as caught:
        read(tmp_path, *((f"run: {text}", []) if source == "file" else ("", [f"run={text}x"])))
    assert len(str(caught.value)) < 1500


def test_anchors_and_merges_of_everyday_work(tmp_path):
    config = read(tmp_path, "lora: &a {rank: 3, target: &t [q, v]}\nevals: [&e {batch: 2}, *e, {<<: *e, batch: 5}]\n")
    assert config.lora.rank == 3 and [part.batch for part in config.evals] == [2, 2, 5]


def test_a_tilde_in_a_path_is_the_home(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text("seed: 7")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(Train, "~/x.yaml").seed == 7
    for bad in ("\0", "", "x" * 300):
        with pytest.raises(InputError):
            load(Train, bad)
