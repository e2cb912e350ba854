"""The laws of a parametrisation, for every member, and float64 transcriptions of what each computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec, describe, init_adapters, merge
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from tests.helpers import largest_difference, tiny_decoder

IN, OUT, R, STACK = 7, 5, 3, 4


def lora_oracle(w, adapter, scale):
    return w + scale * adapter["lora_a"] @ adapter["lora_b"]


def dora_oracle(w, adapter, scale):
    direction = lora_oracle(w, adapter, scale)
    return direction / np.sqrt((direction**2).sum(0, keepdims=True)) * adapter["lora_magnitude_vector"][None]


# name: the changed kernel in float64, numbers trained in one layer beside the pair
MEMBERS = {"lora": (lora_oracle, 0), "dora": (dora_oracle, OUT)}


def case(name, dtype=jnp.float32, stack=()):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(*stack, *shape)), dtype)
    w, scale = draw(IN, OUT), jnp.asarray(0.5 + rng.random(stack), dtype)
    pair = {"lora_a": draw(IN, R), "lora_b": draw(R, OUT)}
    extra = PARAMETRIZATIONS[name].leaves(w, pair, scale)
    return w, {**pair, **{key: leaf * (1 + draw(*leaf.shape[len(stack) :]) / 3) for key, leaf in extra.items()}}, scale


def path(member, x, w, adapter, scale):
    gain = member.gain(w, adapter, scale)
    return (1 if gain is None else gain[None]) * (x @ w + member.delta(x @ adapter["lora_a"], adapter, scale))


def test_every_member_has_a_row():
    assert MEMBERS.keys() == PARAMETRIZATIONS.keys()


@pytest.mark.parametrize("name", MEMBERS)
def test_path_equals_merging_equals_the_transcription(name, x64):
    w, adapter, scale = case(name, jnp.float64)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, IN)))
    merged = PARAMETRIZATIONS[name].merge(w, adapter, scale)
    np.testing.assert_allclose(merged, MEMBERS[name][0](np.asarray(w), jax.tree.map(np.asarray, adapter), scale))
    np.testing.assert_allclose(path(PARAMETRIZATIONS[name], x, w, adapter, scale), x @ merged, atol=1e-12)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_stack_equals_its_layers(name):
    w, adapter, scale = case(name, stack=(STACK,))
    member = PARAMETRIZATIONS[name]
    apart = jnp.stack(
        [member.merge(w[i], jax.tree.map(lambda leaf, i=i: leaf[i], adapter), scale[i]) for i in range(STACK)]
    )
    np.testing.assert_allclose(member.merge(w, adapter, scale), apart, rtol=1e-6, atol=1e-6)
    assert largest_difference(jax.vmap(member.merge)(w, adapter, scale), apart) < 1e-6


@pytest.mark.parametrize("name", MEMBERS)
def test_the_start_is_the_base_and_the_count_is_the_formula(name):
    _, params = tiny_decoder()
    spec = LoraSpec(
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank=R,
        rank_pattern={"layers.1.mlp.down_proj": 1},
        exclude_modules=["layers.2.self_attn.q_proj"],
        parametrization=name,
    )
    adapters = init_adapters(jax.random.key(0), params, spec)
    assert largest_difference(merge(params, adapters, spec), params) < 1e-6
    beside = bool(MEMBERS[name][1])  # one number an output, of which all three modules have 16
    count = 2 * (R * 32 + 16 * beside) + (2 * R + 1) * (24 + 16) + 3 * 16 * beside + R * (31 + 16) + 16 * beside
    assert f"trainable params: {count:,} ||" in describe(params, adapters, spec)


@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_are_finite_differences(name, x64):
    """Of the function itself for LoRA; for DoRA of the function whose norms are held fixed (section 4.3)."""
    w, adapter, scale = case(name, jnp.float64)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, IN)))
    member = PARAMETRIZATIONS[name]
    gain = member.gain(w, adapter, scale)
    norms = 1.0 if gain is None else adapter["lora_magnitude_vector"] / gain

    def held(a):
        c = a.get("lora_magnitude_vector", 1.0) / norms
        return jnp.square(jnp.reshape(c, (1, -1)) * (x @ w + scale * (x @ a["lora_a"]) @ a["lora_b"])).sum()

    found = jax.grad(lambda a: jnp.square(path(member, x, w, a, scale)).sum())(adapter)
    for key, leaf in adapter.items():
        for i in range(0, leaf.size, 4):
            step = jnp.zeros(leaf.size).at[i].set(1e-6).reshape(leaf.shape)
            difference = (held({**adapter, key: leaf + step}) - held({**adapter, key: leaf - step})) / 2e-6
            np.testing.assert_allclose(found[key].ravel()[i], difference, rtol=1e-5)


def test_doras_magnitude_is_the_norm_of_each_output():
    w, adapter, scale = case("dora")
    member = PARAMETRIZATIONS["dora"]
    merged = member.merge(w, adapter, scale)
    np.testing.assert_allclose(jnp.linalg.norm(merged, axis=0), jnp.abs(adapter["lora_magnitude_vector"]), rtol=1e-5)
    twice = {**adapter, "lora_magnitude_vector": 2 * adapter["lora_magnitude_vector"]}
    np.testing.assert_allclose(member.merge(w, twice, scale), 2 * merged, rtol=1e-5)
    longer = {**adapter, "lora_a": 3 * adapter["lora_a"]}  # only the direction of W0 + s A B counts
    np.testing.assert_allclose(member.merge(3 * w, longer, scale), merged, rtol=1e-4, atol=1e-5)


def test_dora_leaves_columns_of_zeros_and_padding_alone():
    w, adapter, scale = case("dora")
    adapter = {**adapter, "lora_b": adapter["lora_b"].at[:, 2].set(0)}
    start = PARAMETRIZATIONS["dora"].leaves(w.at[:, 2].set(0), adapter, scale)
    merged = PARAMETRIZATIONS["dora"].merge(w.at[:, 2].set(0), {**adapter, **start}, scale)
    assert np.isfinite(merged).all() and not merged[:, 2].any()
    padded = {"lora_a": jnp.zeros((IN, R)), "lora_b": jnp.zeros((R, OUT)), "lora_magnitude_vector": jnp.zeros(OUT)}
    np.testing.assert_array_equal(PARAMETRIZATIONS["dora"].merge(w, padded, scale), w)
