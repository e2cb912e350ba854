"""Modules of any name, beside and in what is trained in full."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec, adapted, describe, freeze_mask, init_adapters, merge
from tests.helpers import random_params, trained


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="full")(nn.Dense(5, name="proj")(x))


class Full(nn.Module):
    """Modules called ``full``, one of them inside another."""

    @nn.compact
    def __call__(self, x):
        return Inner(name="full")(nn.tanh(nn.Dense(4, name="up")(x)))


SPECS = {
    "adapted": LoraSpec(target_modules=["full", "proj"], rank=2),
    "trained in full": LoraSpec(target_modules=["up"], modules_to_save=["full.full"], rank=2),
    "with all inside": LoraSpec(target_modules=["up"], modules_to_save=["full"], rank=2, bias="all"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_module_may_be_called_full(name):
    spec, x = SPECS[name], jnp.ones((2, 3))
    params = random_params(Full(), x)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    mine = {"adapted": {"lora_a", "lora_b"}, "trained in full": {"lora_full"}, "with all inside": {"lora_full"}}
    assert set(adapters["full"]["full"]) == mine[name]
    run = lambda params, **more: adapted(Full(), spec).apply({"params": params, **more}, x)
    changed = run(params, lora=adapters)
    np.testing.assert_allclose(changed, run(merge(params, adapters, spec)), rtol=1e-5, atol=1e-6)
    assert not np.allclose(changed, run(params))
    assert "full.full" in describe(params, adapters, spec)
    assert freeze_mask(params, adapters, spec, ["full.full"])["full"]["full"]
