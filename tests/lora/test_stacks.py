"""Stacks that the spec does not know, and boxed parameters: one line that says what to do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(16, name="fc")(x), None


class Scanned(nn.Module):
    name_of_stack: str
    axis: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return stack(name=self.name_of_stack)(x, None)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return experts(name="experts")(x)[0].sum(0)


def run(model, spec):
    x = jnp.ones((2, 16))
    params = model.init(jax.random.key(0), x)["params"]
    return adapted(model, spec).apply({"params": params, "lora": init_adapters(jax.random.key(0), params, spec)}, x)


CASES = {
    "scan": (Scanned("blocks", 0), {}, r"blocks.fc: its kernel is \(3, 16, 16\) .* \(16, 16\) inside .*'blocks'"),
    "vmap": (Mapped(), {}, r"experts.fc: .*stacked=\('experts',\)"),
    "axis 1": (Scanned("layers", 1), {}, r"layers.fc: its kernel is \(16, 3, 16\).*init\(key, params"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_unknown_stack_is_named(case):
    model, more, message = CASES[case]
    with pytest.raises(InputError, match=message) as caught:
        run(model, LoraSpec(rank=2, target_modules=["fc"], **more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model, name", [(Scanned("blocks", 0), "blocks"), (Mapped(), "experts")])
def test_the_advice_works(model, name):
    assert run(model, LoraSpec(rank=2, target_modules=["fc"], stacked=(name,))).shape == (2, 16)


def test_an_error_of_the_model_itself_stays():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(4, name="fc")(x)
            if not self.is_initializing():
                raise IndexError("of the model")

    with pytest.raises(IndexError, match="of the model"):
        run(Broken(), LoraSpec(rank=2, target_modules=["fc"]))


def test_boxed_parameters():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "mlp"))
    model = nn.Sequential([nn.Dense(4, kernel_init=init)])
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    spec = LoraSpec(target_modules=["layers_0"])
    with pytest.raises(InputError, match=r"parameters are boxed .Partitioned.: call flax.linen.unbox"):
        init_adapters(jax.random.key(0), params, spec)
    assert init_adapters(jax.random.key(0), nn.unbox(params), spec)
