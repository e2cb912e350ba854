"""FLOPs: the formula against counts by hand, the count against known programs, and the training step by both."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters
from stablelora_jax.data import Batch
from stablelora_jax.models.architecture import DecoderConfig, decoder_config
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.models.pretrained.shapes import KNOWN
from stablelora_jax.parallel import pmap_layout
from stablelora_jax.training.flops import dots, flops_per_token, peak_flops
from stablelora_jax.training.step import init_state, make_train_step
from tests.conftest import ROOT
from tests.helpers import TINY


def test_formula_is_the_count_by_hand():
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=10)
    config = DecoderConfig(**{**TINY, **sizes, "num_key_value_heads": 1, "head_dim": 4})
    layer = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 12  # q, k, v, o, and the three of the MLP
    assert flops_per_token(config, 0, 0) == 4 * (2 * layer + 80)
    assert flops_per_token(config, 100, 0, loss_fraction=0) == 4 * 2 * layer + 600
    assert flops_per_token(config, 100, 0, loss_fraction=0, frozen=40) == 4 * 2 * layer + 6 * 60 + 4 * 40
    assert flops_per_token(config, 0, 5, loss_fraction=0.25) == 4 * (2 * layer + 20) + 6 * 2 * 5 * 8


MORE = [("meta-llama/Llama-3.2-1B", 5.41), ("meta-llama/Llama-3.2-3B", 14.05)]


@pytest.mark.parametrize("name,billions", [("Qwen/Qwen2-0.5B", 2.29), ("Qwen/Qwen2-1.5B", 6.81), *MORE])
def test_formula_gives_known_values(name, billions):
    """At r=16 on all linears and T=2048, from a table that another program has made."""
    config = decoder_config(KNOWN[name], name)
    assert flops_per_token(config, lora(abstract(config, 16)[1]), 2048) / 1e9 == pytest.approx(billions, abs=0.005)


def test_peaks():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("cpu") is None
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12


X, W = jnp.ones((3, 5)), jnp.ones((5, 5))
ONE = 2 * 3 * 5 * 5


@jax.custom_vjp
def doubled(x):
    return x @ W


doubled.defvjp(lambda x: (doubled(x), x), lambda x, g: (g @ W @ W,))


def looped(x, body=lambda c: c @ W):
    return jax.lax.scan(lambda c, _: (body(c), None), x, length=7)[0]


@pytest.mark.parametrize(
    "function,products",
    [
        (lambda x: x + x, 0),
        (lambda x: x @ W, 1),
        (jax.jit(lambda x: jax.jit(lambda x: x @ W)(x) @ W), 2),
        (lambda x: jnp.einsum("ab,cb->ac", x, W), 1),
        (lambda x: jnp.einsum("ab,abc->c", x, jnp.stack([W] * 3)), 1),
        (lambda x: jnp.einsum("kab,kbc->kac", jnp.stack([x] * 4), jnp.stack([W] * 4)), 4),
        (jax.vmap(lambda row: row @ W), 1),
        (looped, 7),
        (lambda x: looped(x, looped), 49),
        (jax.grad(lambda x: looped(x).sum()), 14),
        (jax.grad(lambda x: jnp.sin(x @ W).sum()), 2),
        (jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ W))(x).sum()), 3),
        (jax.grad(lambda x: looped(x, jax.checkpoint(lambda c: jnp.sin(c @ W))).sum()), 21),
        (doubled, 1),
        (jax.grad(lambda x: doubled(x).sum()), 3),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ W @ W, lambda x: x @ W, x), 2),
        (lambda x: jax.lax.fori_loop(0, 7, lambda i, c: c @ W, x), 7),
        (lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c + 1, x @ W), 1),
    ],
)
def test_products_are_counted(function, products):
    assert dots(jax.make_jaxpr(function)(X)) == products * ONE


def test_every_device_counts():
    assert dots(jax.make_jaxpr(jax.pmap(lambda x: x @ W))(jnp.stack([X] * 8))) == 8 * ONE


def test_what_cannot_be_counted_is_refused():
    def unknown(x):
        return jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c @ W, x)

    with pytest.raises(InputError, match="a while holds matrix products"):
        dots(jax.make_jaxpr(unknown)(X))


def abstract(config, rank, **options):
    """A model, and the shapes of its adapters and parameters."""
    model = Decoder(config, **options)
    params = abstract_params(model)
    init = partial(init_adapters, spec=LoraSpec(target_modules="all-linear", rank=rank))
    return model, jax.eval_shape(lambda p: init(jax.random.key(0), p), params), params


def lora(adapters):
    return sum(x.size for x in jax.tree.leaves(adapters))


def step_dots(config, B, T, learnt, **options):
    """Products of a training step a token, and the numbers of its adapters; nothing is allocated or compiled."""
    model, adapters, params = abstract(config, 8, **options)
    tx, layout = optax.adamw(1e-4), pmap_layout(jax.devices()[:1])
    state = jax.eval_shape(lambda a: init_state(a, tx, jax.random.key(0)), adapters)
    row, at = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, round(learnt * T)), jnp.int32)
    batch = Batch(row, row, row, row, None if learnt == 1 else at)
    step = make_train_step(adapted(model, LoraSpec(target_modules="all-linear", rank=8)), tx, layout)
    taken = layout.abstract(state, "state"), layout.abstract(params, "base"), layout.abstract(batch, "rows")
    return dots(jax.make_jaxpr(step)(*taken)) / (B * T), lora(adapters)


@pytest.mark.parametrize("learnt", [1.0, 0.25])
@pytest.mark.parametrize("attention", ["xla", "blockwise"])
@pytest.mark.parametrize(
    ("shape", "rows", "length"),
    [("qwen2-0.5b", 2, 1024), ("qwen2-0.5b", 1, 1024), ("qwen2-0.5b", 1, 2048), ("llama-15m", 2, 256)],
)
def test_the_training_step_does_what_the_formula_says(shape, rows, length, attention, learnt, monkeypatch):
    """Masked dense attention does 12 L T d, both triangles; in tiles it does little more than 6 L T d."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from bench.shapes import SHAPES

    config = decoder_config(SHAPES[shape], shape)
    done, numbers = step_dots(config, rows, length, learnt, attention=attention)
    needed = flops_per_token(config, numbers, length * (2 if attention == "xla" else 1), loss_fraction=learnt)
    assert done == pytest.approx(needed, rel=0.03)


def test_computing_layers_anew_is_seen():
    config = decoder_config({**KNOWN["Qwen/Qwen2-0.5B"], "num_hidden_layers": 3}, "test")
    kept, _ = step_dots(config, 1, 64, 1.0)
    anew, _ = step_dots(config, 1, 64, 1.0, remat="nothing")
    layers = 2 * 3 * 896 * (2 * 896 + 2 * 128 + 2 * 4864)  # nothing asks for the result of down_proj again
    assert anew - kept == pytest.approx(layers, rel=0.03)
