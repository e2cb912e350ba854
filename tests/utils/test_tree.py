"""Paths, names and patterns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stablelora_jax import InputError
from stablelora_jax.utils import tree

NAMES = [f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
NAMES += ["lm_head", "q_proj", "xq_proj", "model.q_proj_2"]


@pytest.mark.parametrize(
    "path,stack,stacked,expected",
    [
        (("model", "layers", "q"), (2,), ("layers",), ("model.layers.0.q", "model.layers.1.q")),
        (("lm_head",), (), ("layers",), ("lm_head",)),
        (
            ("layers", "experts", "up"),
            (1, 2),
            ("layers", "experts"),
            ("layers.0.experts.0.up", "layers.0.experts.1.up"),
        ),
        (("blocks", "q"), (2,), ("layers",), ("blocks.q[0]", "blocks.q[1]")),
        (("layers", "0", "q"), (), ("layers",), ("layers.0.q",)),
    ],
)
def test_names(path, stack, stacked, expected):
    assert tree.names(path, stack, stacked) == expected


def test_stack_depth_counts_named_components_but_not_lists():
    assert tree.stack_depth(("model", "layers", "q"), ("layers",)) == 1
    assert tree.stack_depth(("layers", "experts", "q"), ("layers", "experts")) == 2
    assert tree.stack_depth(("layers", "3", "q"), ("layers",)) == 0


@pytest.mark.parametrize(
    "name,number",
    [("model.layers.3.mlp", 3), ("layers_4.q", 4), ("Dense_0.q", None), ("a.0.b.1", 0), ("model.norm", None)],
)
def test_layer_number(name, number):
    assert tree.layer_number(name, ("layers",)) == number


@pytest.mark.parametrize(
    "pattern",
    [
        ("q_proj",),
        ("self_attn.q_proj", "lm_head"),
        ("proj",),
        r".*\.q_proj",
        r"model\.layers\.[13]\..*",
        "q_proj",
        "lm_head",
    ],
)
def test_targets_match_as_in_peft(pattern):
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=pattern if isinstance(pattern, str) else list(pattern))
    for name in NAMES:
        assert tree.matches(pattern, name) == bool(tuners.check_target_module_exists(config, name)), (pattern, name)


@given(
    st.sampled_from(
        ["q_proj", "layers.1.self_attn.q_proj", "layers.1", "_proj", ".*_proj", r"layers\.\d.*v_proj", "proj$"]
    )
)
def test_patterns_match_as_in_peft(pattern):
    other = pytest.importorskip("peft.utils.other")
    for name in NAMES:
        if name != pattern:  # PEFT gives the name itself back where nothing matches
            assert tree.pattern_matches(pattern, name) == (other.get_pattern_key([pattern], name) == pattern)


def test_a_pattern_is_matched_at_the_end_of_a_name():
    hits = [name for name in NAMES if tree.pattern_matches("layers.1.self_attn.q_proj", name)]
    assert hits == ["model.layers.1.self_attn.q_proj"]
    assert not tree.pattern_matches("_proj", "a.q_proj") and tree.pattern_matches(".*_proj", "a.q_proj")


def test_require_match_lists_near_misses():
    with pytest.raises(InputError, match=r"target 'q_prj' matches no module; did you mean .*q_proj"):
        tree.require_match("target", "q_prj", False, NAMES)
    with pytest.raises(InputError, match="modules here end in: lm_head"):
        tree.require_match("target", "zzzzz", False, NAMES)
    with pytest.raises(InputError, match="not a valid regular expression"):
        tree.matches("(", "x")


def test_set_in_copies_only_the_way():
    before = {"a": {"b": 1}, "c": {"d": 2}}
    after = tree.set_in(before, ("a", "x", "y"), 3)
    assert before == {"a": {"b": 1}, "c": {"d": 2}} and after["a"] == {"b": 1, "x": {"y": 3}}
    assert after["c"] is before["c"] and tree.get_in(after, ("a", "x", "y")) == 3
    assert tree.get_in(after, ("a", "nothing", "y")) is None


def test_find_dicts_is_sorted_and_stops_at_a_find():
    found = tree.find_dicts({"b": {"k": np.ones(2), "in": {"k": 1}}, "a": {"k": 2}}, lambda node: "k" in node)
    assert list(found) == [("a",), ("b",)]
