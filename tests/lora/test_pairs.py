"""LoraSpec: canonical form, PEFT's meaning of patterns, and what it refuses."""

import math
from dataclasses import replace

import jax.numpy as jnp
import pytest

from stablelora_jax import InputError, LoraSpec
from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.pairs import is_pair, make_target_module

Q1 = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "a,b",
    [
        (dict(target_modules=["v", "q"]), dict(target_modules=("q", "v"))),
        (dict(target_modules=["q", "q"]), dict(target_modules=["q"])),
        (dict(rank_pattern={"q_proj": 2, "up": 3}), dict(rank_pattern=(("up", 3), ("q_proj", 2)))),
        (dict(alpha=16), dict(alpha=16.0)),
        (dict(layers_to_transform=[2, 1]), dict(layers_to_transform=(1, 2))),
        (dict(layers_to_transform=3), dict(layers_to_transform=(3,))),
        (dict(stacked="blocks"), dict(stacked=["blocks"])),
        (dict(target_modules="All-Linear"), dict(target_modules="all-linear")),
        (dict(exclude_modules=None, rank_pattern=None), dict()),
        (dict(in_axes={"o": [0, 1]}), dict(in_axes={"o": (0, 1)})),
        (dict(exclude_modules=["b", "a"]), dict(exclude_modules=("a", "b"))),
    ],
)
def test_equal_specs_compare_and_hash_equal(a, b):
    assert LoraSpec(**a) == LoraSpec(**b) and hash(LoraSpec(**a)) == hash(LoraSpec(**b))


def test_specs_that_differ_in_meaning_differ():
    first = {"q_proj": 2, "layers.1.self_attn.q_proj": 4}
    second = dict(reversed(first.items()))
    assert LoraSpec(rank_pattern=first) != LoraSpec(rank_pattern=second)
    assert LoraSpec(rank_pattern=first).rank_of(Q1) == 2 and LoraSpec(rank_pattern=second).rank_of(Q1) == 4


def test_round_trip_through_plain_data():
    spec = LoraSpec(
        rank=4,
        target_modules="all-linear",
        rank_pattern={".*q": 2, "q": 3},
        in_axes={"o": (0, 1)},
        layers_to_transform=[1],
    )
    assert LoraSpec(**spec.to_dict()) == spec
    assert replace(spec, rank=5).rank == 5


@pytest.mark.parametrize("scaling,expected", [("lora", 6 / 3), ("rslora", 6 / math.sqrt(3))])
def test_scale(scaling, expected):
    spec = LoraSpec(rank=8, alpha=16, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 6}, scaling=scaling)
    assert spec.scale_of(Q1) == pytest.approx(expected)
    assert spec.scale_of("model.layers.1.mlp.up_proj") == pytest.approx(16 / (8 if scaling == "lora" else math.sqrt(8)))


@pytest.mark.parametrize(
    "spec,name,expected",
    [
        (LoraSpec(), Q1, True),
        (LoraSpec(), "model.layers.1.self_attn.k_proj", False),
        (LoraSpec(), "model.layers.1.xq_proj", False),
        (LoraSpec(target_modules=r".*layers\.1\..*"), Q1, True),
        (LoraSpec(target_modules="q_proj"), Q1, False),
        (LoraSpec(target_modules="all-linear"), "lm_head", False),
        (LoraSpec(target_modules="all-linear"), Q1, True),
        (LoraSpec(target_modules=["lm_head"]), "lm_head", True),
        (LoraSpec(exclude_modules=["layers.1.self_attn.q_proj"]), Q1, False),
        (LoraSpec(exclude_modules=r".*\.1\..*"), Q1, False),
        (LoraSpec(layers_to_transform=[0]), Q1, False),
        (LoraSpec(layers_to_transform=[1]), Q1, True),
    ],
)
def test_selects(spec, name, expected):
    assert spec.selects(name) is expected


@pytest.mark.parametrize(
    "bad,message",
    [
        (dict(rank=0), "rank"),
        (dict(rank=2.0), "rank"),
        (dict(rank=True), "rank"),
        (dict(rank_pattern={"q": 0}), r"rank_pattern\['q'\]"),
        (dict(alpha=0), "alpha"),
        (dict(alpha=math.inf), "alpha"),
        (dict(alpha_pattern={"q": -1}), r"alpha_pattern\['q'\]"),
        (dict(dropout=1.0), "dropout"),
        (dict(dropout=-0.1), "dropout"),
        (dict(target_modules=()), "target_modules is empty"),
        (dict(target_modules=""), "target_modules is empty"),
        (dict(scaling="rs"), "scaling must be one of lora, rslora"),
        (dict(parametrization="loha"), "parametrization"),
        (dict(parametrization="dora", lora_bias=True), "true only with lora"),
        (dict(init="normal"), "init"),
        (dict(parametrization="miss", init="pissa"), "has no meaning for it"),
        (dict(parametrization="lora_xs"), "nothing would ever learn"),
        (dict(parametrization="slora", init="orthogonal"), "is not the base"),
        (dict(dropout="x"), "dropout"),
        (dict(target_modules=[1]), "target"),
        (dict(target_modules=None), "target_modules is empty"),
        (dict(layers_to_transform=["1"]), "layers"),
        (dict(rank_pattern=["q_proj"]), "rank_pattern"),
        (dict(in_axes={"a": 0}), "in_axes"),
    ],
)
def test_refusals(bad, message):
    with pytest.raises(InputError, match=message) as error:
        LoraSpec(**bad)
    assert "\n" not in str(error.value)


def test_sites_of_a_stack_with_holes():
    spec = LoraSpec(target_modules=["q"], rank=4, rank_pattern={"layers.2.q": 1}, layers_to_transform=(0, 2))
    target = make_target_module(("layers", "q"), (3,), (5, 6), spec)
    assert target.ranks == (4, 0, 1) and target.rank == 4 and target.parameters == 5 * 11
    assert target.mask().tolist() == [[True] * 4, [False] * 4, [True, False, False, False]]
    assert target.scale().tolist() == [4.0, 0.0, 16.0]


@pytest.mark.parametrize(
    "pair,message",
    [
        ({"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((3, 4))}, "do not make a pair"),
        ({"lora_a": jnp.ones((2, 3, 8)), "lora_b": jnp.ones((8, 4))}, "do not make a pair"),
        ({"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 4))}, "have rank 2, the spec says 8"),
    ],
)
def test_adapters_that_do_not_fit_the_spec(pair, message):
    with pytest.raises(InputError, match=f"q_proj.*{message}"):
        adapter_target_modules({"q_proj": pair}, LoraSpec())


def test_an_adapter_tree_without_pairs_is_refused():
    with pytest.raises(InputError, match="holds no pair"):
        adapter_target_modules({"q_proj": {"lora_a": jnp.ones((3, 2))}}, LoraSpec())
    assert not is_pair({"lora_a": 1}) and is_pair({"lora_a": 1, "lora_b": 2, "magnitude": 3})
