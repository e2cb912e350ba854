"""Names of modules and patterns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stablelora_jax import InputError
from stablelora_jax.lora.names import layer_number, matches, module_names, pattern_matches, require_match, stack_depth

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
    assert module_names(path, stack, stacked) == expected


def test_stack_depth_counts_named_components_but_not_lists():
    assert stack_depth(("model", "layers", "q"), ("layers",)) == 1
    assert stack_depth(("layers", "experts", "q"), ("layers", "experts")) == 2
    assert stack_depth(("layers", "3", "q"), ("layers",)) == 0


@pytest.mark.parametrize(
    "name,number",
    [("model.layers.3.mlp", 3), ("layers_4.q", 4), ("Dense_0.q", None), ("a.0.b.1", 0), ("model.norm", None)],
)
def test_layer_number(name, number):
    assert layer_number(name, ("layers",)) == number


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
        assert matches(pattern, name) == bool(tuners.check_target_module_exists(config, name)), (pattern, name)


@given(
    st.sampled_from(
        ["q_proj", "layers.1.self_attn.q_proj", "layers.1", "_proj", ".*_proj", r"layers\.\d.*v_proj", "proj$"]
    )
)
def test_patterns_match_as_in_peft(pattern):
    other = pytest.importorskip("peft.utils.other")
    for name in NAMES:
        if name != pattern:  # PEFT gives the name itself back where nothing matches
            assert pattern_matches(pattern, name) == (other.get_pattern_key([pattern], name) == pattern)


def test_a_pattern_is_matched_at_the_end_of_a_name():
    hits = [name for name in NAMES if pattern_matches("layers.1.self_attn.q_proj", name)]
    assert hits == ["model.layers.1.self_attn.q_proj"]
    assert not pattern_matches("_proj", "a.q_proj") and pattern_matches(".*_proj", "a.q_proj")


def test_require_match_lists_near_misses():
    with pytest.raises(InputError, match=r"target 'q_prj' matches no module; did you mean .*q_proj"):
        require_match("target", "q_prj", False, NAMES)
    with pytest.raises(InputError, match="modules here end in: lm_head"):
        require_match("target", "zzzzz", False, NAMES)
    with pytest.raises(InputError, match="not a valid regular expression"):
        matches("(", "x")
