"""Patterns of strangers: never a hang, never raw, and what is ordinary matches as in ``re``."""

import json
import re
import time

import jax
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, init_adapters, save_peft
from stablelora_jax.interop.peft_config import from_peft_config
from stablelora_jax.lora.combine.union import _united_target_modules, exactly
from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.names import matches, pattern_matches
from stablelora_jax.optimizers.freeze import freeze_mask
from stablelora_jax.utils import patterns
from stablelora_jax.utils.expressions import LONGEST, WIDEST, expression

MODULES = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
NAMES = [f"model.layers.{i}.{part}.{m}" for i in (0, 3, 31) for part, all_ in MODULES.items() for m in all_]
LAYERS = 32
IN_TIME = 10  # seconds


def params(layers=LAYERS):
    def kernel():
        return {"kernel": np.zeros((layers, 4, 4), np.float32)}

    return {"model": {"layers": {part: {m: kernel() for m in all_} for part, all_ in MODULES.items()}}}


def peft(**keys):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | keys


def start(**keys):
    return init_adapters(jax.random.key(0), params(), LoraSpec(**keys))


HOSTILE = {
    "huge repeats": "((a{1,9999}){1,9999})q_prox",
    "repeats of repeats": "(([a-z_.0-9]+)+)+!",
    "branches": "(.|.)" * 160 + "!",
    "optional": ".?" * 300 + "!",
    "stars": ".*" * 300 + "!",
    "nested": "(" * 2000 + "q_proj" + ")" * 2000,
    "nested within the limit": "(" * 450 + "q_prox" + ")" * 450,
    "too large a number": "q{99999999999}",
    "flags inside": "q_proj(?i)",
    "written out in memory": "(?:(?:(?:a{1000}){1000}){1000}){1000}",
    "hidden by a comment": "(?#[)(a{60000}){60000}(?#])",
    "hidden by another": "(?x)# [ \n (a{60000}){60000} # ]",
    "unbalanced": "(q_proj",
    "long": "q_pro[x]" * 1000,
}


@pytest.mark.parametrize("where", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "in_axes"])
@pytest.mark.parametrize("pattern", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pattern_is_one_line_in_time(pattern, where):
    value = pattern if where.endswith("modules") else {pattern: (0,) if where == "in_axes" else 2}
    start_time = time.monotonic()
    with pytest.raises(InputError) as caught:
        start(**{where: value})
    assert time.monotonic() - start_time < IN_TIME and len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", HOSTILE.values(), ids=HOSTILE)
def test_a_stranger_s_configuration_never_hangs(pattern, key):
    start_time = time.monotonic()
    try:
        spec, _ = from_peft_config(peft(**{key: pattern if key.endswith("modules") else {pattern: 2}}), params())
        assert init_adapters(jax.random.key(0), params(), spec)
    except InputError as error:
        assert len(str(error)) < 400
    assert time.monotonic() - start_time < IN_TIME


@pytest.mark.parametrize("pattern", ["(([a-z_.0-9]+)+)+!", "(", "q{99999999999}", "(.|.)" * 160 + "!"])
def test_freezing_never_hangs(pattern):
    spec = LoraSpec()
    with pytest.raises(InputError, match="valid regular|matches no module|longer than"):
        freeze_mask(params(), start(), spec, [pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?!.*mlp).*q_proj",
        r"(?=.*self)(?!.*\.0\.).*(q|v)_proj",
        r".*\.(q|k|v)_proj",
        r"(?i)MODEL.*Q_PROJ",
        r"model\.layers\.(0|3)\..*(?<!q)_proj",
        r".*layers\.\d{1,2}\.mlp\.(?:up|down)_proj",
        r"([a-z]+\.)+\d+\.([a-z_]+\.)+q_proj",
        r"(m).*\1lp.up_proj",
        "model.layers.3.mlp.up_proj",
        r"model\.layers\.3\.mlp\.up_proj|model\.layers\.31\.mlp\.up_proj",
        "((model.layers.0.mlp.up_proj)|(x|y))|z",
        "modelxlayers.3.mlp.up_proj",
        "q_proj",
        "",
        "a||model.layers.3.mlp.up_proj",
    ],
)
def test_what_is_ordinary_matches_as_in_re(pattern):
    ending = f"(.*\\.)?({pattern})$"
    for name in [*NAMES, *(n[6:] for n in NAMES), "q_proj", "x.q_proj", "qxproj", "a" * 200]:
        assert matches(pattern, name) == bool(re.fullmatch(pattern, name)), name
        if not pattern.startswith("(?i)"):  # which PEFT's frame makes invalid
            assert pattern_matches(pattern, name) == bool(re.match(ending, name)), name
            assert pattern_matches(f"^{pattern}", name) == bool(re.match(f"(.*\\.)?(^{pattern})$", name)), name


def test_a_table_finds_every_pattern_of_many():
    keys = ["q_proj", "layers.3.mlp.up_proj", ".*k_proj", r"^model\.layers\.31\.mlp\.down_proj", "layers.3.mlp.u._proj"]
    made = patterns.Table([*keys, *(f"m{i}.x" for i in range(5000))])
    for name in NAMES:
        found = {i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name)}
        assert made.numbers(name) == found


def test_the_first_of_several_wins():
    assert LoraSpec(rank_pattern={".*q_proj": 3, "q_proj": 5}).rank_of("a.q_proj") == 3
    assert LoraSpec(rank_pattern={"q_proj": 5, ".*q_proj": 3}).rank_of("a.q_proj") == 5


def test_long_alternations_of_names_are_no_long_expressions():
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(500)]
    for target in (exactly(names), "|".join(names)):
        assert len(target) > LONGEST and start(target_modules=target)
    with pytest.raises(InputError, match=f"more than {LONGEST}: list the names"):
        LoraSpec(target_modules=exactly(names) + "|.*v_proj")
    specs = [LoraSpec(target_modules=exactly(names)), LoraSpec(target_modules=".*v_proj")]
    united = {"target_modules": r"a\.b", "exclude_modules": (), "layers_to_transform": None}
    assert _united_target_modules(specs, ["a.b"]) == united


def test_what_is_written_out_has_a_limit():
    assert matches("(.{1,1000}){1,1000}q_proj", NAMES[0]) and not expression("(a{10}){10}").matches("a")
    with pytest.raises(InputError, match="repeats too much"):
        expression(f"a{{{WIDEST + 1}}}")


LIVE = {f"layers.{i}.self_attn.{m}": 4 for i in range(LAYERS) for m in ("q_proj", "v_proj")}
MAPS = {
    "dead names": {f"m{i}": 4 for i in range(20_000)},
    "dead names with dots": {f"a.m{i}.x": 4 for i in range(20_000)},
    "live and dead names": LIVE | {f"m{i}": 4 for i in range(20_000)},
    "expressions": {f".*m{i}.?x.*": 4 for i in range(20_000)},
    "lookaheads": {f".*q_proj(?!{i})": 4 for i in range(900)},
}


@pytest.mark.parametrize("table", MAPS.values(), ids=MAPS)
def test_maps_of_very_many_patterns(table):
    start_time = time.monotonic()
    for make in (
        lambda: start(rank_pattern=table, alpha_pattern=table),
        lambda: from_peft_config(peft(rank_pattern=table, alpha_pattern=table), params()),
    ):
        try:
            make()
        except InputError as error:
            assert len(str(error)) < 400
    assert time.monotonic() - start_time < IN_TIME


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"])
def test_lists_of_very_many_entries(key):
    many = list(range(-10, 10**6)) if key.startswith("layers") else [f"m{i}" for i in range(100_000)]
    raw = peft(**{key: many + ["q_proj"] * (key == "target_modules")})
    start_time = time.monotonic()
    spec, dropped = from_peft_config(raw, params())
    assert len(dropped) > 99_000 and init_adapters(jax.random.key(0), params(), spec)
    with pytest.raises(InputError, match="matches no module|there is no layer"):
        start(**{key: many})
    assert time.monotonic() - start_time < IN_TIME


def test_what_a_config_names_in_vain_is_said_in_short(tmp_path):
    from stablelora_jax import load_peft

    save_peft(tmp_path, start(), LoraSpec())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] += [f"m{i}" for i in range(1000)]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="m9'? and 990 more match no module") as warned:
        load_peft(tmp_path, params())
    assert all(len(str(one.message)) < 1000 for one in warned)


@pytest.mark.parametrize(
    "keys",
    [{"layers": range(10**30)}, {"layers": range(2**20 + 1)}, {"layers": 10**5000}, {"rank": 10**5000}]
    + [{"alpha": 10**5000}, {"rank": 10**12}, {"rank": 2**62}],
    ids=range(7),
)
def test_numbers_beyond_reason_are_one_line(keys):
    with pytest.raises(InputError) as caught:
        start(**keys)
    assert len(str(caught.value)) < 200


def test_a_kernel_that_holds_nothing_is_not_adapted():
    base = params()
    base["model"]["layers"]["self_attn"]["q_proj"]["kernel"] = np.zeros((LAYERS, 0, 4), np.float32)
    with pytest.raises(InputError, match=r"q_proj: a kernel of shape \(32, 0, 4\) holds nothing"):
        init_adapters(jax.random.key(0), base, LoraSpec())
    assert init_adapters(jax.random.key(0), base, LoraSpec(target_modules=["v_proj"]))


@pytest.mark.parametrize("a, b", [((3, 0), (0, 3)), ((0, 8), (8, 3)), ((2, 0, 8), (2, 8, 3))])
def test_pairs_that_hold_nothing_are_refused(a, b):
    with pytest.raises(InputError, match=r"q_proj: lora_a .* hold nothing"):
        adapter_target_modules({"q_proj": {"lora_a": np.zeros(a), "lora_b": np.zeros(b)}}, LoraSpec())
