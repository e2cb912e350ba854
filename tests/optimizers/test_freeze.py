"""Parts of adapters that stay: names against PEFT's own, no gradient, the same bits under every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, optimizers
from stablelora_jax.interop.peft_layout import layout
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.optimizers import still_shrinking
from stablelora_jax.optimizers.freeze import freeze, freeze_mask, stop_frozen_gradients
from stablelora_jax.utils import tree
from tests.helpers import jit, tiny_decoder, tokens, trained
from tests.optimizers.members import CORE, MEMBERS, WRAPPED, some

FULL = LoraSpec(
    rank=3,
    parametrization="dora",
    target_modules=["q_proj", "up_proj", "embed_tokens"],
    layers_to_transform=None,
    rank_pattern={"layers.1.*up_proj": 2},
    modules_to_save=["lm_head", "layers.1.input_layernorm", "layers.2.input_layernorm"],
    bias="lora_only",
)
PAIRS = LoraSpec(rank=2, target_modules=["q_proj", "down_proj"], layers_to_transform=(0, 2), lora_bias=True)


def base(spec):
    _, params = tiny_decoder(qkv_bias=True, o_bias=True)
    return params, init_adapters(jax.random.key(0), params, spec)


def by_name(mask, adapters, params, spec):
    """Whether each tensor is frozen, by our name for it, along the table that writes PEFT's files."""
    found = {}
    for entry in layout(find_target_modules(params, spec), params, spec):
        leaf, one = (tree.get_in(t, entry.path) for t in (adapters, mask))
        assert one.dtype == bool and one.ndim == leaf.ndim
        part = entry.take(np.broadcast_to(one, leaf.shape))
        assert part.all() or not part.any(), entry.name
        kind = next(
            (k for k in ("lora_A", "lora_B.bias", "lora_B", "lora_embedding_A", "lora_embedding_B") if k in entry.name),
            "",
        )
        module = entry.name.split(f".{kind}")[0] if kind else entry.name.rsplit(".", 1)[0].replace(".base_layer", "")
        found[f"{module}.{entry.path[-1]}"] = bool(part.all())
    return found


@pytest.mark.parametrize(
    "spec,patterns,chosen",
    [
        (FULL, ["lora_a"], lambda n: n.endswith(".lora_a")),
        (FULL, [".*lora_a"], lambda n: n.endswith(".lora_a")),
        (FULL, ["layers.0.*", ".*lora_b"], lambda n: ".layers.0." in n or n.endswith("lora_b")),
        (FULL, ["layers.1"], lambda n: ".layers.1." in n),
        (FULL, "lm_head", lambda n: n == "lm_head.kernel"),
        (FULL, ["lora_magnitude_vector", "bias"], lambda n: n.endswith(("vector", ".bias"))),
        (FULL, ["layers.2.input_layernorm.scale"], lambda n: n == "model.layers.2.input_layernorm.scale"),
        (
            FULL,
            ["input_layernorm", "embed_tokens.lora_b"],
            lambda n: "input_l" in n or n == "model.embed_tokens.lora_b",
        ),
        (FULL, [r"layers\.[12].self_attn.q_proj.*"], lambda n: "1.self_attn" in n or "2.self_attn" in n),
        (FULL, ["model"], lambda n: n.startswith("model.")),
        (FULL, [], lambda n: False),
        (PAIRS, ["lora_bias"], lambda n: n.endswith("lora_bias")),
        (
            PAIRS,
            ["down_proj", "layers.2.*.lora_b"],
            lambda n: "down_proj" in n or (".2." in n and n.endswith("lora_b")),
        ),
        (PAIRS, ["q_proj.lora_b"], lambda n: n.endswith("q_proj.lora_b")),
    ],
)
def test_a_pattern_is_the_end_of_a_name_or_of_a_module_that_holds_it(spec, patterns, chosen):
    params, adapters = base(spec)
    mask = freeze_mask(params, adapters, spec, patterns)
    assert jax.tree.structure(mask) == jax.tree.structure(adapters)
    found = by_name(mask, adapters, params, spec)
    expected = {name: name.endswith("lora_bias") if patterns == ["lora_bias"] else chosen(name) for name in found}
    assert found == expected and len(found) > 11


def test_shapes_are_all_that_is_read():
    params, adapters = base(FULL)
    patterns = ["layers.0", "lora_magnitude_vector"]
    mask = freeze_mask(params, adapters, FULL, patterns)
    shapes = [jax.eval_shape(lambda x: x, t) for t in (params, adapters)]
    seen = [freeze_mask(*shapes, FULL, patterns)]
    tx = lambda a: freeze(optimizers.stable_lora(1e-3), freeze_mask(params, a, FULL, patterns))
    state = jit(lambda a: (seen.append(freeze_mask(params, a, FULL, patterns)), tx(a).init(a))[1])(adapters)
    for other in seen:
        jax.tree.map(np.testing.assert_array_equal, other, mask)
    plain = jax.eval_shape(optimizers.stable_lora(1e-3).init, shapes[1])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), plain) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert jax.tree.structure(jax.eval_shape(tx(shapes[1]).init, shapes[1])) == jax.tree.structure(state)


def test_layers_without_an_adapter_go_with_the_others():
    params, adapters = base(PAIRS)
    mask = freeze_mask(params, adapters, PAIRS, ["layers.0", "layers.2.self_attn"])["model"]["layers"]
    assert mask["self_attn"]["q_proj"]["lora_a"].all()  # layer 1 is padding
    assert mask["mlp"]["down_proj"]["lora_b"].ravel().tolist() == [True, False, False]
    assert mask["mlp"]["down_proj"]["lora_bias"].shape == (3, 1)


@pytest.mark.parametrize(
    "patterns,message",
    [
        (["lora_c"], "freeze: 'lora_c' matches no module; did you mean lora_"),
        (["lora_a", "layers.7"], "freeze: 'layers.7' matches no module"),
        (["layers.1"], "freeze: 'layers.1' matches no module"),  # not adapted
        (["proj"], "freeze: 'proj' matches no module; did you mean"),
        (["lora_("], "'lora_(' is not a valid regular expression"),
        (["lora_.*"], "freeze: lora_.* leave nothing to train"),
        (["layers.0", "q_proj", "down_proj.*"], "leave nothing to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(patterns, message):
    params, adapters = base(PAIRS)
    with pytest.raises(InputError) as caught:
        freeze_mask(params, adapters, PAIRS, patterns)
    assert message in str(caught.value)


def dots(jaxpr):
    """Matrix products, those inside scans and calls too."""
    inner = [v for e in jaxpr.eqns for v in e.params.values()]
    subs = [getattr(v, "jaxpr", v) for v in inner if hasattr(getattr(v, "jaxpr", v), "eqns")]
    return sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) + sum(map(dots, subs))


def test_no_gradient_flows_and_a_leaf_that_is_frozen_whole_costs_none():
    model, params = tiny_decoder()
    spec = LoraSpec(rank=2, target_modules=["q_proj", "o_proj"])
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    loss = lambda a: jnp.square(adapted(model, spec).apply({"params": params, "lora": a}, tokens())).mean()
    products, gradients, plain = {}, {}, jit(loss)(adapters)
    for patterns in ((), ("lora_a",), ("q_proj",), ("layers.0",), ("layers.[12]", "o_proj.lora_b")):
        mask = freeze_mask(params, adapters, spec, patterns)
        stopped = lambda a, mask=mask: loss(stop_frozen_gradients(a, mask))
        products[patterns] = dots(jax.make_jaxpr(jax.grad(stopped))(adapters).jaxpr)
        value, gradients[patterns] = jit(jax.value_and_grad(stopped))(adapters)
        assert np.allclose(value, plain, rtol=1e-6)
        if patterns:
            expected = jax.tree.map(lambda one, g: np.where(one, 0, g), mask, gradients[()])
            jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-6), gradients[patterns], expected)
    assert products[("lora_a",)] < products[()] and products[("q_proj",)] < products[()]
    assert products[("layers.0",)] == products[()]  # a part of a stack is not saved
    held = jax.make_jaxpr(jax.grad(lambda a: loss(optimizers.freeze_a(a))))(adapters)
    assert products[("lora_a",)] == dots(held.jaxpr)


N, M, R = 7, 5, 2
MASK = {  # pairs of one shape, so that one batch holds them all
    "whole": {"lora_a": True, "lora_b": True},
    "only_a": {"lora_a": True, "lora_b": False},
    "only_b": {"lora_a": False, "lora_b": True},
    "free": {"lora_a": False, "lora_b": False, "bias": True},
    "layers": {"lora_a": [True, False, False], "lora_b": [True, False, False]},
    "norm": {"lora_full": {"scale": True}},
}
PARTS = {  # the same without what is frozen
    "free": lambda t: {name: t["free"][name] for name in ("lora_a", "lora_b")},
    "layers": lambda t: jax.tree.map(lambda x: x[1:], t["layers"]),
}


def pair(rng, stack=()):
    a, b = rng.normal(size=(*stack, N, R)), rng.normal(size=(*stack, R, M))
    b[0] = 0  # a whole layer of a stack, or a row: the start, and columns that pad
    a.flat[0] = -0.0
    return {"lora_a": jnp.asarray(a, jnp.float32), "lora_b": jnp.asarray(b, jnp.float32)}


def problem(half=True):
    rng = np.random.default_rng(3)
    adapters = {name: pair(rng, (3,) * (name == "layers")) for name in MASK if name != "norm"}
    adapters["free"]["bias"] = jnp.array([-0.0, 0.5, 1.0])
    adapters["norm"] = {"lora_full": {"scale": jnp.array([1.0, -0.0])}}
    mask = {k: v for k, v in MASK.items() if half or "only" not in k}
    adapters = {k: v for k, v in adapters.items() if k in mask}
    one = lambda path, leaf: np.array(tree.get_in(mask, tuple(p.key for p in path))).reshape(-1, *[1] * (leaf.ndim - 1))
    return adapters, jax.tree_util.tree_map_with_path(one, adapters)


def gradients(adapters, step):
    """Not held: the optimizer is not to see them where it must not."""

    def drawn(path, leaf):
        seed = [step, *(ord(c) for c in jax.tree_util.keystr(path))]
        return jnp.asarray(np.random.default_rng(seed).normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(drawn, adapters)


def run(tx, adapters, grads, steps=4):
    update, state = jit(tx.update), jit(tx.init)(adapters)
    for step in range(steps):
        updates, state = update(grads(step), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    return adapters, updates


def make(name, **more):
    member = MEMBERS[name]
    decayed = {"weight_decay": 0.1} if name != "scaled_adamw_gpt2" else {}
    return member.make(0.05, scale=2.0, **decayed, **more)


def bits(leaf):
    return np.asarray(leaf, np.float32).view(np.uint32)


@pytest.mark.parametrize("name", some(CORE, MEMBERS))
def test_frozen_numbers_stay_to_the_bit_and_nothing_is_nan(name):
    """Decay, clipping and shrink around everything; pairs frozen whole, A alone, B alone, one layer of a stack."""
    half = name != "stiefel_lora"
    adapters, mask = problem(half)
    around = (lambda tx: tx) if name == "stable_lora" else lambda tx: optimizers.shrink_until_stable(tx, 0.01)
    tx = freeze(optax.chain(optax.clip_by_global_norm(0.5), around(make(name))), mask)
    after, updates = run(tx, adapters, lambda step: gradients(adapters, step))
    idle = {"lora_a", "bias", "scale"} if name.startswith("lora_fa") else {"bias", "scale"}
    for (path, one), old, new, u in zip(
        jax.tree_util.tree_leaves_with_path(mask), *map(jax.tree.leaves, (adapters, after, updates)), strict=True
    ):
        one = np.broadcast_to(one, old.shape)
        assert np.isfinite(new).all() and not np.asarray(u)[one].any()
        assert (bits(old) == bits(new))[one].all()
        assert one.all() or path[-1].key in idle or (bits(old) != bits(new)).any()


@pytest.mark.parametrize("name", some([*WRAPPED, "lora_rite"], CORE))
def test_free_pairs_do_not_see_the_frozen_ones(name):
    adapters, mask = problem(half=False)
    after, _ = run(freeze(make(name), mask), adapters, lambda step: gradients(adapters, step))
    part = {key: take(adapters) for key, take in PARTS.items()}
    alone, _ = run(make(name), part, lambda step: {k: take(gradients(adapters, step)) for k, take in PARTS.items()})
    for key, take in PARTS.items():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), take(after), alone[key])
        assert (bits(alone[key]["lora_b"]) != bits(part[key]["lora_b"])).any()


ALONE = ["stable_lora", "scaled_gd_damped", "scaled_adamw_gpt2", "lora_rite", "lora_pro", "altlora", "oplora", "allora"]


@pytest.mark.parametrize("name", ALONE)
def test_what_freezing_one_factor_alone_means(name):
    """The other is trained as if the first had its gradient and its steps taken back, but where rules couple them."""
    coupled = {"lora_pro", "lora_pro_full", "oplora"}
    rng = np.random.default_rng(3)
    adapters = {"p": jax.tree.map(lambda x: x + 0.1, pair(rng))}
    free = make_plain(name)
    free_update, free_start = jit(free.update), jit(free.init)(adapters)
    for still, moving in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
        mask = {"p": {still: np.ones((1, 1), bool), moving: np.zeros((1, 1), bool)}}
        tx = freeze(make_plain(name), mask)
        update, state = jit(tx.update), jit(tx.init)(adapters)
        ours, taken_back, free_state = adapters, adapters, free_start
        for step in range(4):
            updates, state = update(gradients(ours, step), state, ours)
            ours = optax.apply_updates(ours, updates)
            updates, free_state = free_update(gradients(ours, step), free_state, taken_back)
            taken_back = {"p": {**optax.apply_updates(taken_back, updates)["p"], still: adapters["p"][still]}}
        error = np.abs(np.asarray(ours["p"][moving]) - np.asarray(taken_back["p"][moving])).max()
        if name in coupled:
            assert error > 1e-4 or (name, moving) == ("lora_pro", "lora_a")
        elif (name, moving) != ("scaled_adamw_gpt2", "lora_b"):  # whose B sees the A that its step would have made
            assert error < 1e-5


def make_plain(name):
    return MEMBERS[name].make(0.05, scale=2.0)


def test_stiefel_lora_does_not_take_half_a_pair():
    adapters, mask = problem()
    with pytest.raises(InputError, match="stiefel_lora moves both factors of only_a at once: freeze both or neither"):
        freeze(optimizers.shrink_until_stable(make("stiefel_lora"), 0.01), mask).init(adapters)


def test_latches_are_off_where_a_is_frozen():
    adapters, mask = problem()
    tx = freeze(optax.chain(optax.clip_by_global_norm(1.0), optimizers.stable_lora(1e-3, 0.01)), mask)
    expected = {"whole": False, "only_a": False, "only_b": True, "free": True, "layers.1": True, "layers.2": True}
    state = tx.init(adapters)
    assert still_shrinking(state) == expected | {"layers.0": False}
    padded = {**adapters, "layers": jax.tree.map(lambda x: x * jnp.arange(3)[:, None, None], adapters["layers"])}
    assert still_shrinking(tx.init(padded)) == expected


def test_a_frozen_a_is_not_shown_shrunk():
    """B's step is preconditioned by A as it is, whatever shrinks around the optimizer."""
    adapters, mask = problem()
    grads = lambda step: gradients(adapters, step)
    plain, _ = run(freeze(make("scaled_gd_damped"), mask), adapters, grads)
    around, _ = run(freeze(optimizers.shrink_until_stable(make("scaled_gd_damped"), 0.3), mask), adapters, grads)
    assert np.array_equal(plain["only_a"]["lora_b"], around["only_a"]["lora_b"])
    assert not np.array_equal(plain["free"]["lora_b"], around["free"]["lora_b"])


def test_frozen_gradients_do_not_count_for_clipping():
    adapters, mask = problem()
    tx = freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), mask)
    updates, _ = tx.update(gradients(adapters, 0), tx.init(adapters), adapters)
    np.testing.assert_allclose(optax.tree.norm(updates), 1, rtol=1e-6)


def test_nothing_frozen_is_the_optimizer_itself():
    params, adapters = base(PAIRS)
    mask, tx = freeze_mask(params, adapters, PAIRS, ()), optimizers.lora_rite(1e-3)
    assert freeze(tx, mask) is tx
    assert [id(x) for x in jax.tree.leaves(stop_frozen_gradients(adapters, mask))] == [
        id(x) for x in jax.tree.leaves(adapters)
    ]
