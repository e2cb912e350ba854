"""Adapters on NNX models: rows of the laws, ``nnx.jit``, state that is no parameter, adapters as an ``nnx.State``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stablelora_jax import InputError, LoraSpec, adapted, describe, init_adapters, merge
from tests.helpers import jit, long
from tests.lora.foreign import laws
from tests.lora.foreign.laws import Row, perturbed, relative_difference
from tests.lora.foreign.nnx_layers import Cache
from tests.lora.foreign.nnx_models import Gemma3, Llama, Noisy, Qwen3, Scanned, Unrolled

R = 2
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (8, 5)), jnp.int32)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4, 4, 3)), jnp.float32)


def pair(size, out, *stack):
    """The shapes of a pair."""
    return (*stack, size, R), (*stack, R, out)


def row(model, args, shapes, targets="all-linear", tolerance=1e-5, **spec):
    """The row of an NNX model: its parameters are ``nnx.state(model, nnx.Param)``, the rest stays with it."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    base = lambda params, *args: nnx.merge(graphdef, params, rest)(*args)
    spec = LoraSpec(target_modules=targets, rank=R, alpha=3, **spec)
    return Row(model, base, params, args, spec, shapes, tolerance=tolerance)


class Holder(nnx.Module):
    """A module with a name, called ``inner``, and a function of it and the input."""

    def __init__(self, inner, call=lambda inner, *args: inner(*args)):
        self.inner, self.call = inner, call

    def __call__(self, *args):
        return self.call(self.inner, *args)


def x(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=(8, *shape)), jnp.float32)


def small(inner, args, shapes, **kwargs):
    """The row of one module of NNX."""
    call = {"call": kwargs.pop("call")} if "call" in kwargs else {}
    return lambda: row(Holder(inner(nnx.Rngs(0)), **call), args, {"inner": shapes}, ["inner"], **kwargs)


def heads(size=8):
    return {f"inner.{name}": pair(size, size) for name in ("query", "key", "value", "out")}


def attention():
    inner = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    return row(Holder(inner), (x(5, 8),), heads())


def attend(inner, tokens):
    return inner.attend(jnp.tanh(inner(tokens)))


SMALL = {
    "linear": small(lambda r: nnx.Linear(6, 4, rngs=r), (x(5, 6),), pair(6, 4)),
    "linear_general": small(
        lambda r: nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=r), (x(5, 3, 4),), pair(12, 10)
    ),
    "linear_general_batch": small(
        lambda r: nnx.LinearGeneral(4, 5, axis=-1, batch_axis={0: 8}, rngs=r), (x(3, 4),), pair(4, 5, 8)
    ),
    "conv": small(lambda r: nnx.Conv(4, 6, (3, 3), strides=2, rngs=r), (x(6, 6, 4),), pair(36, 6)),
    "conv_dilated": small(lambda r: nnx.Conv(4, 6, (3,), kernel_dilation=2, rngs=r), (x(9, 4),), pair(12, 6)),
    "conv_groups": small(lambda r: nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=r), (x(7, 4),), pair(6, 6)),
    "conv_causal": small(lambda r: nnx.Conv(4, 6, (3,), padding="CAUSAL", rngs=r), (x(7, 4),), pair(12, 6)),
    "conv_transpose": small(lambda r: nnx.ConvTranspose(4, 6, (3,), strides=2, rngs=r), (x(5, 4),), pair(12, 6)),
    "einsum": small(lambda r: nnx.Einsum("btd,dnh->btnh", (6, 2, 4), (2, 4), rngs=r), (x(5, 6),), pair(6, 8)),
    "einsum_joined": small(lambda r: nnx.Einsum("btd,cdk->cbtk", (3, 6, 4), rngs=r), (x(5, 6),), pair(6, 12)),
    "einsum_stacked": small(
        lambda r: nnx.Einsum("btd,cdk->cbtk", (3, 6, 4), rngs=r), (x(5, 6),), pair(6, 4, 3), stacked=("inner",)
    ),
    "embed": small(lambda r: nnx.Embed(23, 6, rngs=r), (TOKENS,), pair(23, 6)),
    "attend": small(lambda r: nnx.Embed(23, 6, rngs=r), (x(5, 6),), pair(23, 6), call=nnx.Embed.attend),
    "embed_and_attend": small(lambda r: nnx.Embed(23, 6, rngs=r), (TOKENS,), pair(23, 6), call=attend),
    "attention": attention,
}


def decoder_shapes(prefix="layers", stack=(), attn="attn"):
    """Of a layer with the attention and the MLP of Qwen3."""
    sizes = {
        f"{attn}.q_proj": (16, 16),
        f"{attn}.k_proj": (16, 8),
        f"{attn}.v_proj": (16, 8),
        f"{attn}.o_proj": (16, 16),
    }
    sizes |= {"mlp.gate_proj": (16, 24), "mlp.up_proj": (16, 24), "mlp.down_proj": (24, 16)}
    return {f"{prefix}.{name}": pair(*size, *stack) for name, size in sizes.items()}


def qwen3():
    shapes = decoder_shapes("layers.0") | decoder_shapes("layers.1")
    return row(Qwen3(rngs=nnx.Rngs(0)), (TOKENS,), shapes, tolerance=1e-4)


def qwen3_of_some_layers():
    """One layer of the list, and the head and the look-up table by name."""
    shapes = {"layers.1.attn.q_proj": pair(16, 16), "embedder": pair(23, 16), "lm_head": pair(16, 23)}
    targets = ["layers.1.attn.q_proj", "embedder", "lm_head"]
    return row(Qwen3(rngs=nnx.Rngs(0)), (TOKENS,), shapes, targets, tolerance=1e-4)


def gemma3():
    shapes = decoder_shapes("layers.0", attn="self_attn") | decoder_shapes("layers.1", attn="self_attn")
    shapes |= {f"vision_tower.attention.{name}": pair(8, 8) for name in ("query", "key", "value", "out")}
    shapes |= {"vision_tower.patch_embedding": pair(12, 8), "mm_input_projection_weight": pair(8, 16)}
    found = row(Gemma3(rngs=nnx.Rngs(0)), (TOKENS, IMAGES), shapes, tolerance=1e-4)
    return Row(**{**vars(found), "batched": (0, 1)})


def gemma3_tables():
    """Both look-up tables; that of tokens is the head, too, and belongs to a module called ``weight``."""
    shapes = {"embed_tokens.weight": pair(23, 16), "vision_tower.position_embedding": pair(4, 8)}
    targets = ["embed_tokens.weight", "position_embedding"]
    found = row(Gemma3(rngs=nnx.Rngs(0)), (TOKENS, IMAGES), shapes, targets, tolerance=1e-4)
    return Row(**{**vars(found), "batched": (0, 1)})


def llama():
    sizes = {"q_proj": (16, 16), "kv_proj": (16, 16), "o_proj": (16, 16)}
    sizes |= {"mlp.gate_proj": (16, 24), "mlp.up_proj": (16, 24), "mlp.down_proj": (24, 16)}
    shapes = {f"layers.{i}.{name}": pair(*size) for i in range(2) for name, size in sizes.items()}
    return row(Llama(rngs=nnx.Rngs(0)), (TOKENS,), shapes, tolerance=1e-4)


def llama_table():
    """A bare parameter: its pair is at its own path."""
    shapes = {"input_embedding": pair(23, 16)}
    return row(Llama(rngs=nnx.Rngs(0)), (TOKENS,), shapes, ["input_embedding"], tolerance=1e-4)


def scanned():
    return row(Scanned(rngs=nnx.Rngs(0)), (TOKENS,), decoder_shapes(stack=(3,)), tolerance=1e-4)


def unrolled():
    shapes = {name: size for i in range(3) for name, size in decoder_shapes(f"layers.{i}").items()}
    return row(Unrolled(rngs=nnx.Rngs(0)), (TOKENS,), shapes, tolerance=1e-4)


MODELS = {
    f.__name__: f for f in (qwen3, qwen3_of_some_layers, gemma3, gemma3_tables, llama, llama_table, scanned, unrolled)
}
ROWS = SMALL | MODELS
QUICK = ("linear", "conv", "einsum_joined", "qwen3", "llama", "scanned")  # the others are long


def cases(quick=QUICK):
    return pytest.mark.parametrize("name", [name if name in quick else long(name) for name in ROWS])


@pytest.mark.parametrize("name", ROWS)
def test_adapters_are_as_expected(name):
    laws.adapters_are_as_expected(ROWS[name]())


VARIANTS = [("lora", name) if name not in ("unrolled", "gemma3_tables") else long("lora", name) for name in ROWS]
VARIANTS += [("dora", name) if name in QUICK else long("dora", name) for name in ROWS]
VARIANTS += [long("rslora", name) for name in QUICK]


@pytest.mark.parametrize(("variant", "name"), VARIANTS)
def test_apply_is_merge(variant, name):
    laws.apply_is_merge(ROWS[name](), variant)


@cases()
def test_fresh_adapters_change_nothing(name):
    laws.fresh_adapters_change_nothing(ROWS[name]())


@cases(("llama", "scanned"))
def test_training_lowers_the_loss(name):
    laws.training_lowers_the_loss(ROWS[name]())


@cases(("qwen3", "scanned"))
def test_devices_change_nothing(name):
    laws.devices_change_nothing(ROWS[name]())


@pytest.mark.parametrize("name", ROWS)
def test_peft_round_trip(name, tmp_path):
    laws.peft_round_trip(ROWS[name](), tmp_path)


def split(tree):
    """Parameters or adapters of :class:`Scanned` as those of :class:`Unrolled`."""
    plain = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    key = int if isinstance(tree, nnx.State) else str
    layers = {key(i): jax.tree.map(lambda leaf, i=i: leaf[i], plain["layers"]) for i in range(3)}
    plain = {**plain, "layers": layers}
    if not isinstance(tree, nnx.State):
        return plain
    state = nnx.state(Unrolled(rngs=nnx.Rngs(1)), nnx.Param)
    nnx.replace_by_pure_dict(state, plain)
    return state


def test_stacked_is_separate():
    laws.stacked_is_separate(scanned(), unrolled(), split)


def snapshot(model):
    """Everything in a module: its structure, and the values of all variables, which must not be tracers."""
    graphdef, state = nnx.split(model)
    leaves = jax.tree.leaves(state)
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return graphdef, [np.asarray(raw(leaf)) for leaf in leaves]


def noisy():
    return row(Noisy(rngs=nnx.Rngs(0)), (x(6),), {"fc": pair(6, 8), "out": pair(8, 4)})


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_module_is_unchanged(train):
    """Running statistics and counters of keys are read from the module and never written into it."""
    found = noisy()
    found.model.train() if train else found.model.eval()
    found = row(found.model, found.args, found.shapes)
    before = snapshot(found.model)
    laws.adapters_are_as_expected(found)
    laws.apply_is_merge(found, "lora")
    lora, adapters = found.lora(), perturbed(found.fresh())
    again = [found.run(lora, found.params, adapters, *found.args) for _ in range(2)]
    assert relative_difference(*again) == 0
    str(lora.describe(found.params, *found.args))
    after = snapshot(found.model)
    assert after[0] == before[0]
    assert all((a == b).all() for a, b in zip(after[1], before[1], strict=True))


def test_under_nnx_jit():
    """The module may be an argument of ``nnx.jit``, and what is adapted there is its traced state."""
    found = llama()
    adapters = perturbed(found.fresh())

    @nnx.jit
    def step(model, adapters, tokens):
        lora = adapted(model, found.spec)
        loss = lambda a: lora.apply({"params": nnx.state(model, nnx.Param), "lora": a}, tokens).sum()
        return jax.value_and_grad(loss)(adapters)

    before = snapshot(found.model)
    value, gradient = step(found.model, adapters, TOKENS)
    plain = jit(jax.value_and_grad(lambda a: found.run(found.lora(), found.params, a, TOKENS).sum()))
    assert relative_difference((value, gradient), plain(adapters)) < 1e-4
    assert all((a == b).all() for a, b in zip(snapshot(found.model)[1], before[1], strict=True))


def test_adapters_as_a_state():
    """``lora.state(adapters)`` is an ``nnx.State`` of ``nnx.LoRAParam``, which apply, merge and ``jax.grad`` take."""
    found = qwen3_of_some_layers()
    lora, adapters = found.lora(), perturbed(found.fresh())
    state = lora.state(adapters)
    assert isinstance(state, nnx.State)
    variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    assert variables and all(isinstance(variable, nnx.LoRAParam) for variable in variables)
    assert nnx.to_pure_dict(state).keys() == adapters.keys()

    def loss(a):
        return found.run(lora, found.params, a, TOKENS).sum()

    (y, gradient), (plain, plain_gradient) = (jit(jax.value_and_grad(loss))(a) for a in (state, adapters))
    assert y == plain
    assert isinstance(gradient, nnx.State)
    assert relative_difference(nnx.to_pure_dict(gradient), plain_gradient) == 0
    merged = lora.merge(found.params, state)
    assert relative_difference(merged, lora.merge(found.params, adapters)) == 0


class Two(nnx.Module):
    """Kernels whose axes need no tracing."""

    def __init__(self, *, rngs):
        self.first, self.second = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


@pytest.mark.parametrize("whole", [False, True], ids=["state", "module"])
def test_functions_by_names(whole):
    """``init_adapters``, ``merge`` and ``describe`` find kernels by their names, in a state or a module, too."""
    model = Two(rngs=nnx.Rngs(0))
    found = row(model, (x(6),), {"first": pair(6, 8), "second": pair(8, 4)})
    given, key = model if whole else found.params, jax.random.key(3)
    adapters = init_adapters(key, given, found.spec)
    assert relative_difference(adapters, found.fresh()) == 0
    assert jax.tree.structure(adapters) == jax.tree.structure(found.fresh())
    adapters = perturbed(adapters)
    merged = merge(given, adapters, found.spec)
    y = merged(x(6)) if isinstance(merged, nnx.Module) else found.base(merged, x(6))
    assert relative_difference(y, found.run(found.lora(), found.params, adapters, x(6))) < 1e-5
    assert relative_difference(nnx.state(model, nnx.Param), found.params) == 0
    assert "first" in str(describe(given, found.spec))


def test_cache_is_an_output():
    """A model that writes into a cache of ``nnx.Cache`` variables: a function that takes it and returns it."""
    model = Qwen3(rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def fn(params, tokens, cache):
        cache = jax.tree.map(lambda leaf: leaf, cache)
        return nnx.merge(graphdef, params)(tokens, cache), cache

    lora = adapted(fn, LoraSpec(target_modules="all-linear", rank=R))
    cache = [Cache(8, 8) for _ in range(2)]
    adapters = perturbed(lora.init(jax.random.key(0), params, TOKENS, cache))
    run = jit(lambda tokens, cache: lora.apply({"params": params, "lora": adapters}, tokens, cache))
    first, written = run(TOKENS[:, :3], cache)
    last, _ = run(TOKENS[:, 3:], written)
    whole = nnx.merge(graphdef, lora.merge(params, adapters))(TOKENS)
    assert relative_difference(jnp.concatenate([first, last], 1), whole) < 1e-4
    assert int(cache[0].position[...]) == 0 and int(written[0].position[...]) == 3


def test_describe_names_every_leaf():
    """Each leaf that could be adapted, by name."""
    found = llama()
    text = str(found.lora().describe(found.params, TOKENS))
    for name in ("layers.0.q_proj", "layers.1.kv_proj", "input_embedding", "layers.0.mlp.down_proj"):
        assert name in text


@pytest.mark.parametrize(
    ("targets", "words"),
    [(["qproj"], "qproj"), (["input_layernorm"], "input_layernorm"), (["rope"], "rope")],
)
def test_pattern_that_matches_nothing(targets, words):
    with pytest.raises(InputError, match=words) as error:
        row(Llama(rngs=nnx.Rngs(0)), (TOKENS,), {}, targets).fresh()
    assert "\n" not in str(error.value)


def test_adapters_of_another_model():
    """One line that names a pair and says what to do."""
    found, other = llama(), perturbed(qwen3().fresh())
    with pytest.raises(InputError, match=r"layers\.\d\.attn\.\w_proj") as error:
        found.run(found.lora(), found.params, other, TOKENS)
    assert "\n" not in str(error.value)
