"""The published Gemma (PyPI ``gemma``), tiny and random, and its own LoRA as an oracle."""

from __future__ import annotations

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gm = pytest.importorskip("gemma.gm")
    pytest.importorskip("gemma.gm.nn._config")

from stablelora_jax import LoraSpec  # noqa: E402
from tests.helpers import jit, random_params  # noqa: E402
from tests.lora.foreign import laws  # noqa: E402

R = 4
PRODUCTS = ["q_einsum", "kv_einsum", "attn_vec_einsum", "gating_einsum", "linear"]
LAYER = {
    "attn.q_einsum": ((8, R), (R, 16)),
    "attn.kv_einsum": ((8, R), (R, 16)),
    "attn.attn_vec_einsum": ((16, R), (R, 8)),
    "mlp.gating_einsum": ((8, R), (R, 24)),
    "mlp.linear": ((12, R), (R, 8)),
}  # as the model's own LoRA: gate and value of the MLP are one product, so they share A


@pytest.fixture(autouse=True)
def ranks_promoted():
    """The model adds axes by itself."""
    with jax.numpy_rank_promotion("allow"):
        yield


@cache
def tiny():
    kinds = gm.nn.AttentionType
    config = gm.nn.config.TransformerConfig(
        num_embed=16,
        embed_dim=8,
        hidden_dim=12,
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        sliding_window_size=4,
        use_qk_norm=True,
    )
    return type("Tiny", (gm.nn.Transformer,), {"__annotations__": {"config": object}, "config": config})(
        dtype=jnp.float32
    )


@cache
def row(*more):
    """The model with every product adapted, s = 1 as in its own LoRA."""
    model, tokens = tiny(), (jnp.arange(8)[:, None] * 3 + jnp.arange(6)[None] ** 2) % 15 + 1
    shapes = {f"layer_{i}.{name}": pair for i in range(2) for name, pair in LAYER.items()}
    shapes |= {"embedder.input_embedding": ((16, R), (R, 8))} if more else {}
    spec = LoraSpec(rank=R, alpha=R, target_modules=[*PRODUCTS, *more])
    params = random_params(model, tokens)
    return laws.Row(model, partial(logits, model), params, (tokens,), spec, shapes, tolerance=1e-4)


def logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


@pytest.mark.parametrize("more", [(), ("input_embedding",)])
def test_laws(more, tmp_path):
    one = row(*more)
    laws.adapters_are_as_expected(one)
    laws.apply_is_merge(one, "lora")
    laws.apply_is_merge(one, "dora")
    laws.fresh_adapters_change_nothing(one)
    laws.training_lowers_the_loss(one)
    laws.devices_change_nothing(one)
    laws.peft_round_trip(one, tmp_path)


def test_the_same_pair_gives_the_output_of_its_own_lora():
    one, theirs = row(), gm.nn.LoRA(rank=R, model=tiny(), dtype=jnp.float32)
    adapters = laws.perturbed(one.fresh())
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), *one.args)["params"]
    params = jax.tree_util.tree_map_with_path(partial(counterpart, adapters, one.params), shapes)
    found = jit(partial(one.run, one.lora()))(one.params, adapters, *one.args)
    expected = jit(lambda params, tokens: theirs.apply({"params": params}, tokens))(params, *one.args)
    assert laws.relative_difference(found.logits, expected.logits) < 1e-5


def counterpart(adapters, params, path, leaf):
    """The value of a leaf of their tree: a and b from ``adapters``, all else from ``params``."""
    keys = [part.key for part in path]
    if "lora" not in keys:
        return jnp.asarray(get(params, keys))
    module = keys[: keys.index("lora")]
    name = module.pop().removeprefix("_LoRAEinsum_")  # bare leaves of the MLP are named in it
    module += [] if name.isdigit() else [name]
    return get(adapters, module)[f"lora_{keys[-1]}"].reshape(leaf.shape)


def get(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree
