"""Every parametrisation at every kind of module: Flax's own, and leaves that a function of its own reads."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import adapted
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from tests.helpers import jit, largest_difference, long, random_params, soak
from tests.lora.test_parametrizations import moved, spec_of

LEFT_OUT = dict.fromkeys(("lora_c", "dora_c"), ("join", "conv"))  # that contract two axes
LEFT_OUT["reslora"] = ("embed", "split", "join", "heads", "conv", "experts")  # that are in no stack of layers
DEFAULT = ("shira", "vblora")  # the others have rows in the long tier


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return jnp.tanh(nn.Dense(6, name="fc")(h)), None


class Everything(nn.Module):
    """Embed (looked up and as the head), Dense in a scan, DenseGeneral both ways, Einsum, Conv."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(12, 6, name="embed")
        h, _ = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(
            embed(ids), None
        )
        h = nn.DenseGeneral(6, axis=(-2, -1), name="join")(nn.DenseGeneral((2, 4), name="split")(h))
        h = nn.Einsum((6, 2, 4), "btd,dhk->bthk", name="heads")(h).reshape(*ids.shape, 8)
        return embed.attend(nn.Conv(6, (3,), name="conv")(h))


def function(params, ids):
    """The leaves of a model without modules: a scan, experts in one product, a convolution, a tied embedding."""
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), params["embed"][ids], params["layers"])
    h = jnp.einsum("btd,edf->btef", h, params["experts"]).reshape(*ids.shape, 12)
    numbers = jax.lax.conv_dimension_numbers(h.shape, params["conv"].shape, ("NWC", "WIO", "NWC"))
    return jax.lax.conv_general_dilated(h, params["conv"], (1,), "SAME", dimension_numbers=numbers) @ params["embed"].T


def of_modules(ids):
    names = ["embed", "fc", "split", "join", "heads", "conv"]
    return Everything(), random_params(Everything(), ids), {"target_modules": names, "in_axes": {"join": (0, 1)}}


def of_leaves(ids):
    rng = np.random.default_rng(0)
    shapes = {"embed": (12, 6), "layers": (2, 6, 6), "experts": (3, 6, 4), "conv": (3, 12, 6)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for name, shape in shapes.items()}
    return function, params, {"target_modules": list(shapes)}


def rows():
    """One kind of model for each parametrisation, by turns; the rest is soak."""
    for number, name in enumerate(PARAMETRIZATIONS):
        for turn, model_of in enumerate((of_modules, of_leaves)):
            own = soak if (number + turn) % 2 else long
            yield (name, model_of) if name in DEFAULT else own(name, model_of)


@pytest.mark.parametrize("name,model_of", rows())
def test_the_path_is_the_merged_model_in_values_and_gradients(name, model_of):
    ids = jnp.arange(10).reshape(2, 5)
    model, params, chosen = model_of(ids)
    kept = [target for target in chosen["target_modules"] if target not in LEFT_OUT.get(name, ())]
    chosen = {**chosen, "target_modules": kept}
    if name == "lorta":  # kernels of one size
        chosen = {"target_modules": ["split", "heads"] if model_of is of_modules else ["layers"]}
    spec = spec_of(name, rank=2, **chosen)
    lora = adapted(model, spec)
    adapters = moved(jit(lambda params: lora.init(jax.random.key(0), params, ids))(params))
    plain = model.apply if isinstance(model, nn.Module) else lambda variables, ids: model(variables["params"], ids)

    def cost(apply, adapters):
        y = apply(adapters)
        return jnp.square(y).mean(), y

    paths = {
        "path": lambda adapters: lora.apply({"params": params, "lora": adapters}, ids),
        "merged": lambda adapters: plain({"params": lora.merge(params, adapters, safe=False)}, ids),
    }
    found = {
        key: jit(jax.grad(lambda a, apply=apply: cost(apply, a), has_aux=True, allow_int=True))(adapters)
        for key, apply in paths.items()
    }
    gradients, values = zip(*found.values(), strict=True)
    assert largest_difference(values[0], plain({"params": params}, ids)) > 1e-3
    assert largest_difference(values[0], values[1]) < 1e-5
    floats = [[g for g in jax.tree.leaves(tree) if g.dtype == jnp.float32] for tree in gradients]
    assert largest_difference(floats[0], floats[1]) < 1e-4
