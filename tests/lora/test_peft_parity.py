"""Parametrisations and starts against PEFT's own: functions, gradients, counts, merged weights, converted adapters."""

import math
from collections import OrderedDict
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import (
    LoraSpec,
    adapted,
    init_adapters,
    merge,
    save_peft,
    save_pretrained,
    split_frozen,
    with_frozen,
)
from stablelora_jax.lora.initializers import INITIALIZERS
from tests.helpers import jit, long, random_calibration, tiny_decoder, tokens
from tests.lora.test_parametrizations import CHOSEN, MEMBERS, moved, spec_of

SIZES = {"narrow": (7, 5), "wide": (5, 9), "square": (9, 9), "halved": (9, 4)}  # kernels (in, out), one after another
R = 3  # divides neither 7 nor 5
EVEN = {"narrow": (6, 4), "wide": (4, 8), "square": (8, 8), "halved": (8, 2)}  # for a rank of 2 that divides all


class Layers(nn.Module):
    """Linear layers of some sizes, with a bias each and a tanh between."""

    sizes: Any

    @nn.compact
    def __call__(self, x):
        for name, (_, out) in self.sizes.items():
            x = nn.tanh(nn.Dense(out, name=name)(x))
        return x


def libraries():
    """PyTorch and PEFT, which are loaded here, not where this file is collected."""
    return pytest.importorskip("torch"), pytest.importorskip("peft")


def layers(torch, sizes, seed=0):
    """The same network twice: PyTorch's module, and our parameters."""
    rng, theirs, params = np.random.default_rng(seed), OrderedDict(), {}
    for name, (inputs, out) in sizes.items():
        kernel, bias = rng.normal(size=(inputs, out)) / inputs**0.5, rng.normal(size=out) / 3
        params[name] = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
        theirs[name] = torch.nn.Linear(inputs, out)
        with torch.no_grad():
            theirs[name].weight.copy_(torch.tensor(kernel.T))
            theirs[name].bias.copy_(torch.tensor(bias))
        theirs[f"{name}_tanh"] = torch.nn.Tanh()
    return torch.nn.Sequential(theirs), params


def numbers(tensor):
    return tensor.detach().numpy().copy()


def vera_bases(module, size):
    """PEFT's, cut to the layer, are (r, in) and (out, r)."""
    a, b = module.vera_A["default"][:, : size[0]], module.vera_B["default"][: size[1]]
    return {"frozen_a": numbers(a).T, "frozen_b": numbers(b).T}


def shira_places(module, size):
    """PEFT's are (outputs, inputs), two rows of numbers."""
    rows, columns = module.shira_indices["default"].numpy()
    return {"frozen_index": columns * size[1] + rows}


def randlora_bases(module, size):
    """PEFT's, cut to the layer, are A (r, 1, p) and B (q, n, r), whose last axes are multiplied as they lie."""
    small, terms = min(size), math.ceil(min(size) / R)
    return {
        "frozen_wide": numbers(module.randlora_B["default"][: max(size), :terms]).reshape(max(size), -1),
        "frozen_thin": numbers(module.randlora_A["default"][:, 0, :small]),
    }


# PEFT's configuration; what each trained leaf is called there; the frozen leaves of one of its layers; our scaling
# and rank, and the sizes of the kernels
OTHERS = {
    "miss": (lambda peft, **k: peft.MissConfig(**k), {"lora_d": "miss_block"}, lambda *_: {}, dict(scaling="none")),
    "miss_mini": (
        lambda peft, **k: peft.MissConfig(init_weights="mini", **k),
        {"lora_d": "miss_block"},
        lambda *_: {},
        dict(scaling="none"),
    ),
    "bat": (
        lambda peft, **k: peft.MissConfig(init_weights="bat", **k),
        {"lora_blocks": "miss_block"},
        lambda *_: {},
        dict(scaling="none", rank=2),
        EVEN,
    ),
    "shira": (
        lambda peft, **k: peft.ShiraConfig(**k),
        {"lora_values": "shira_weight"},
        shira_places,
        dict(scaling="none", rank=2),
    ),
    "vera": (
        lambda peft, **k: peft.VeraConfig(save_projection=True, **k),
        {"lora_lambda_d": "vera_lambda_d", "lora_lambda_b": "vera_lambda_b"},
        vera_bases,
        dict(scaling="none"),
    ),
    "randlora": (
        lambda peft, **k: peft.RandLoraConfig(randlora_alpha=2, **k),
        {"lora_lambda": "randlora_lambda", "lora_gamma": "randlora_gamma"},
        randlora_bases,
        dict(alpha=2),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_parametrisation_of_pefts(name):
    """Its numbers in ours: the start, the count, the function, every gradient, and the merged weights."""
    config, names, bases, own_spec, *sizes = OTHERS[name]
    torch, peft = libraries()
    sizes, rank = sizes[0] if sizes else SIZES, own_spec.get("rank", R)
    base, params = layers(torch, sizes)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, config(peft, r=rank, target_modules=list(sizes)))
    spec = LoraSpec(parametrization=name, target_modules=tuple(sizes), stacked=(), **{"rank": rank, **own_spec})
    start = split_frozen(jit(lambda params: init_adapters(jax.random.key(0), params, spec))(params))[0]
    modules = {layer: theirs.get_submodule(f"base_model.model.{layer}") for layer in sizes}
    own = lambda layer, leaf: getattr(modules[layer], names[leaf])["default"]
    count = sum(leaf.size for leaf in jax.tree.leaves(start))
    assert count == theirs.get_nb_trainable_parameters()[0] == sum(MEMBERS[name][1](*s, rank) for s in sizes.values())
    adapters = {}
    for layer, size in sizes.items():
        assert start[layer].keys() == names.keys()
        for leaf in names:
            parameter = own(layer, leaf)
            np.testing.assert_allclose(start[layer][leaf], parameter.detach(), atol=1e-7, err_msg=f"{layer} {leaf}")
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape) / 3)
        adapters[layer] = {leaf: numbers(own(layer, leaf)) for leaf in names} | bases(modules[layer], size)
    x = np.random.default_rng(1).normal(size=(6, sizes["narrow"][0])).astype(np.float32)
    expected = theirs(torch.tensor(x))
    torch.square(expected).sum().backward()
    trained, frozen = split_frozen(adapters)

    def cost(trained):
        whole = {layer: {**trained[layer], **frozen.get(layer, {})} for layer in sizes}
        y = adapted(Layers(sizes), spec).apply({"params": params, "lora": whole}, jnp.asarray(x))
        return jnp.square(y).sum(), (y, merge(params, whole, spec))

    gradient, (ours, merged) = jit(jax.grad(cost, has_aux=True))(trained)
    np.testing.assert_allclose(ours, expected.detach(), atol=1e-5)
    for layer in sizes:
        for leaf in names:
            wanted = own(layer, leaf).grad.numpy()
            assert np.abs(wanted).max() > 1e-3
            scale = max(1, np.abs(wanted).max())
            np.testing.assert_allclose(gradient[layer][leaf], wanted, atol=1e-5 * scale, err_msg=f"{layer} {leaf}")
    plain = theirs.merge_and_unload()
    for layer in sizes:
        weight = plain.get_submodule(layer).weight.detach().numpy()
        np.testing.assert_allclose(merged[layer]["kernel"], weight.T, atol=1e-5, err_msg=layer)


def vblora_leaves(theirs, modules, of):
    """PEFT's logits of B are (parts, r, vectors)."""
    logits = {
        layer: {"lora_logits_a": of(m.vblora_logits_A), "lora_logits_b": of(m.vblora_logits_B).swapaxes(0, 1)}
        for layer, m in modules.items()
    }
    return {**logits, "lora_shared": {"lora_bank": of(theirs.base_model.vblora_vector_bank)}}


def unilora_leaves(theirs, modules, of):
    return {**{layer: {} for layer in modules}, "lora_shared": {"lora_theta": of(theirs.base_model.unilora_theta_d)}}


def unilora_frozen(modules):
    """PEFT's own assignment, drawn by NumPy."""
    of = lambda own: numbers(own["default"]).T
    index = {
        layer: {"frozen_index_a": of(m.unilora_indices_A), "frozen_index_b": of(m.unilora_indices_B)}
        for layer, m in modules.items()
    }
    every = np.concatenate([leaf.ravel() for own in index.values() for leaf in own.values()])
    return {**index, "lora_shared": {"frozen_counts": np.bincount(every, minlength=24)}}


# PEFT's configuration; its trained leaves, and frozen ones, as ours lie; our options
TOGETHER = {
    "vblora": (
        lambda peft, **k: peft.VBLoRAConfig(num_vectors=6, vector_length=4, topk=2, **k),
        vblora_leaves,
        lambda modules: {},
        {"vectors": 6, "length": 4},
    ),
    "unilora": (
        lambda peft, **k: peft.UniLoraConfig(theta_d_length=24, **k),
        unilora_leaves,
        unilora_frozen,
        {"length": 24},
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_a_parametrisation_of_pefts_that_shares(name):
    """Its numbers in ours: where the start lies, the count, the function, every gradient, and the merged weights."""
    config, leaves, frozen_of, options = TOGETHER[name]
    torch, peft = libraries()
    sizes = {"narrow": (12, 8), "wide": (8, 16)}
    base, params = layers(torch, sizes=sizes)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, config(peft, r=R, target_modules=list(sizes)))
    modules = {layer: theirs.get_submodule(f"base_model.model.{layer}") for layer in sizes}
    chosen = {"rank": R, "target_modules": tuple(sizes), "stacked": (), "scaling": "none", "options": options}
    spec = LoraSpec(parametrization=name, **chosen)
    start = split_frozen(jit(lambda params: init_adapters(jax.random.key(0), params, spec))(params))[0]
    begun = leaves(theirs, modules, lambda own: numbers(own["default"]))
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(np.shape, begun)
    count = sum(leaf.size for leaf in jax.tree.leaves(start))
    assert count == theirs.get_nb_trainable_parameters()[0]
    for ours, other in zip(jax.tree.leaves(start), jax.tree.leaves(begun), strict=True):  # draws of one distribution
        assert 0.5 < np.std(ours) / np.std(other) < 2
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 3)
    trained = leaves(theirs, modules, lambda own: numbers(own["default"]))
    x = np.random.default_rng(1).normal(size=(6, 12)).astype(np.float32)
    expected = theirs(torch.tensor(x))
    torch.square(expected).sum().backward()

    def cost(trained):
        whole = with_frozen(trained, frozen_of(modules))
        y = adapted(Layers(sizes), spec).apply({"params": params, "lora": whole}, jnp.asarray(x))
        return jnp.square(y).sum(), (y, merge(params, whole, spec))

    gradient, (ours, merged) = jit(jax.grad(cost, has_aux=True))(trained)
    np.testing.assert_allclose(ours, expected.detach(), atol=1e-5)
    wanted = leaves(theirs, modules, lambda own: own["default"].grad.numpy().copy())
    scale = max(1, *(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted)))
    assert scale > 1
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * scale), gradient, wanted)
    plain = theirs.merge_and_unload()
    for layer in sizes:
        weight = plain.get_submodule(layer).weight.detach().numpy()
        np.testing.assert_allclose(merged[layer]["kernel"], weight.T, atol=1e-5, err_msg=layer)


ALPHA = 5


def start_of(init, size, rank=4, seed=0):
    """The kernel, PEFT's layer, and our adapter and spec, both as they start on that kernel."""
    torch, peft = libraries()
    kernel = np.random.default_rng(seed).normal(size=size).astype(np.float32) / size[0] ** 0.5
    layer = torch.nn.Linear(*size, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(kernel.T))
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, init_lora_weights=init, target_modules=["m"])
    torch.manual_seed(seed)
    theirs = peft.get_peft_model(torch.nn.Sequential(OrderedDict(m=layer)), config)
    spec = LoraSpec(rank=rank, alpha=ALPHA, init=init, target_modules=("m",), stacked=())
    params = {"m": {"kernel": jnp.asarray(kernel)}}
    adapters = jit(lambda params: init_adapters(jax.random.key(seed), params, spec))(params)
    return params, theirs, jax.tree.map(np.asarray, adapters), spec


def factors(theirs):
    """PEFT's A (in, r) and B (r, out), as ours lie."""
    layer = theirs.get_submodule("base_model.model.m")
    return (numbers(getattr(layer, name)["default"].weight).T for name in ("lora_A", "lora_B"))


class One(nn.Module):
    """A linear layer."""

    out: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.out, use_bias=False, name="m")(x)


@pytest.mark.parametrize("size", [(12, 9), (9, 12)])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_moves_pefts_base(init, size):
    """PEFT subtracts it from the base, ours in the path: the same base function, and the same after any step."""
    torch, _ = libraries()
    params, theirs, adapters, spec = start_of(init, size)
    adapter, scale = adapters["m"], spec.scale_of("m")
    a, b = factors(theirs)
    np.testing.assert_allclose(adapter["lora_a"] @ adapter["lora_b"], a @ b, atol=1e-5)
    for one, other in ((adapter["lora_a"], a), (adapter["lora_b"].T, b.T)):  # each column up to its sign
        np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-5)
    residual = params["m"]["kernel"] - scale * adapter["frozen_a"] @ adapter["frozen_b"]
    moved_base = theirs.get_submodule("base_model.model.m").base_layer.weight.detach().numpy()
    np.testing.assert_allclose(residual, moved_base.T, atol=1e-5)
    x = np.random.default_rng(1).normal(size=(6, size[0])).astype(np.float32)
    ours = jit(lambda own: adapted(One(size[1]), spec).apply({"params": params, "lora": {"m": own}}, x))
    np.testing.assert_allclose(ours(adapter), theirs(torch.tensor(x)).detach(), atol=1e-5)
    np.testing.assert_allclose(ours(adapter), x @ params["m"]["kernel"], atol=1e-5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 3)
    a, b = factors(theirs)
    expected = theirs(torch.tensor(x)).detach().numpy()
    assert np.abs(expected - x @ np.asarray(params["m"]["kernel"])).max() > 0.1
    np.testing.assert_allclose(ours({**adapter, "lora_a": a, "lora_b": b}), expected, atol=1e-5)


# standard deviation of the entries of A and of B of rank r, and of how many ranks each factor is
DRAWN = {
    "orthogonal": lambda r: (((0.5**0.5) / 10, r // 2), ((0.5**0.5) / 10, r // 2)),
    "gaussian": lambda r: ((1 / r, r), (0.0, 0)),
}


@pytest.mark.parametrize("init", DRAWN)
def test_a_start_that_is_drawn(init):
    """Of so many inputs and outputs that a deviation is known to about two parts in a hundred."""
    size, rank = (900, 700), 6
    _, theirs, adapters, _ = start_of(init, size, rank)
    assert adapters["m"].keys() == {"lora_a", "lora_b"}
    for a, b in (factors(theirs), (adapters["m"]["lora_a"], adapters["m"]["lora_b"])):
        assert a.shape == (size[0], rank) and b.shape == (rank, size[1])
        assert np.abs(a @ b).max() < 1e-6
        for factor, (deviation, ranks) in zip((a, b), DRAWN[init](rank), strict=True):
            np.testing.assert_allclose(factor.std(), deviation, rtol=0.05)
            values = np.linalg.svd(factor, compute_uv=False)  # equal, but for the draw
            expected = [deviation * (max(size) if factor is a else min(size)) ** 0.5 * (rank / max(ranks, 1)) ** 0.5]
            np.testing.assert_allclose(values, expected * ranks + [0.0] * (rank - ranks), rtol=0.15, atol=1e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, its parameters, and a directory from which others load it."""
    (torch, _), transformers = libraries(), pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("base")
    model, params = tiny_decoder()
    save_pretrained(directory, model, params)
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        plain = load()(torch.tensor(np.asarray(tokens()))).logits.numpy()
    return model, params, directory, load, plain


PLAIN_STARTS = [init for init in INITIALIZERS if init not in ("kaiming", "nystrom", "lora_sb")]
CONVERTED = [(name, None) for name in MEMBERS] + [("lora", init) for init in PLAIN_STARTS]
CONVERTED += [
    ("dora", "pissa"),
    ("slora", "pissa"),
    ("slora", "nystrom"),
    ("lora_xs", "init_ab"),
    ("lora_xs", "lora_sb"),
]
DEFAULT = [("lora", "pissa"), ("vera", None), ("edora", None)]


@pytest.mark.parametrize("name,init", [*DEFAULT, *(long(*case) for case in CONVERTED if case not in DEFAULT)])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_peft_computes_what_was_converted(name, init, base, tmp_path):
    """Of every parametrisation and start, two sizes of kernels and a layer without an adapter."""
    torch, peft = libraries()
    model, params, directory, load, plain = base
    chosen = dict(
        rank=4, target_modules=CHOSEN.get(name, ["q_proj", "down_proj"]), exclude_modules=["layers.1.self_attn.q_proj"]
    )
    spec = LoraSpec(parametrization=name, init=init, **chosen) if init else spec_of(name, **chosen)
    calibration = random_calibration(params, spec)
    adapters = jit(lambda params: init_adapters(jax.random.key(0), params, spec, calibration=calibration))(params)
    adapters = moved(adapters)
    own = jax.device_get(adapters["model"]["layers"]["self_attn"]["q_proj"])
    unadapted = {key: np.stack([leaf[0], 0 * leaf[1], leaf[2]]) for key, leaf in own.items()}  # gets no gradient
    adapters["model"]["layers"]["self_attn"]["q_proj"] = jax.tree.map(jnp.asarray, unadapted)
    save_peft(tmp_path, adapters, spec, base_model=str(directory), params=params)
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(tokens()))).logits.numpy()
    ours = jit(lambda a: adapted(model, spec).apply({"params": params, "lora": a}, tokens()))(adapters)
    scale = max(1, np.abs(expected).max())
    assert np.abs(ours - expected).max() < 1e-4 * scale
    assert np.abs(expected - plain).max() > 1e-3 * scale
