"""Parameters that modules share: Uni-LoRA's projection and its special cases, LoRTA's tensor, kinds of modules."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec, combine, describe, init_adapters, merge, split_frozen, to_lora
from stablelora_jax.generation.bank import make_bank
from stablelora_jax.lora.parametrizations.lora import SHARED
from stablelora_jax.lora.plain import plain_adapters
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.optimizers.freeze import freeze_mask, stop_frozen_gradients
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from tests.helpers import jit, largest_difference, tiny_decoder
from tests.lora.test_parametrizations import MEMBERS, SHARED_COUNT, moved, one, plain, spec_of

SIZES = {"first": (7, 5), "second": (3, 8), "third": (4, 4)}
D, LENGTH = 2 * (12 + 11 + 8), 24  # numbers in all pairs of rank 2, of which 14 entries of theta are used 3 times


def kernels(sizes):
    rng = np.random.default_rng(0)
    return {name: {"kernel": jnp.asarray(rng.normal(size=size))} for name, size in sizes.items()}


def uni_lora():
    """Parameters, adapters, and all numbers of all pairs as a function of theta."""
    params = kernels(SIZES)
    chosen = {"target_modules": list(SIZES), "options": {"length": LENGTH}, "scaling": "none"}
    spec = LoraSpec(parametrization="unilora", rank=2, **chosen)
    adapters = init_adapters(jax.random.key(3), params, spec, dtype=jnp.float64)

    def numbers(theta):
        moved = {**adapters, SHARED: {**adapters[SHARED], "lora_theta": theta}}
        pairs = plain_adapters(moved, find_target_modules(params, spec), spec)
        return jnp.concatenate([pairs[m][f"lora_{side}"].ravel() for m in SIZES for side in "ab"])

    return params, spec, adapters, numbers


def test_uni_loras_projection_is_an_isometry_that_uses_all_of_theta_alike(x64):
    _, _, adapters, numbers = uni_lora()
    theta = adapters[SHARED]["lora_theta"]
    p = np.asarray(jit(jax.jacrev(numbers))(theta))
    assert p.shape == (D, LENGTH)
    np.testing.assert_array_equal((p != 0).sum(1), 1)
    assert sorted((p != 0).sum(0)) == [2] * 10 + [3] * 14
    np.testing.assert_allclose(p.T @ p, np.eye(LENGTH), atol=1e-12)
    g = jnp.asarray(np.random.default_rng(1).normal(size=D))
    found, gradient = jit(lambda theta: (numbers(theta), jax.vjp(numbers, theta)[1](g)[0]))(theta)
    np.testing.assert_allclose(found, p @ theta, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(theta), rtol=1e-12)
    np.testing.assert_allclose(gradient, p.T @ g, atol=1e-12)


def test_uni_lora_trains_one_vector_and_keeps_its_numbers_without_a_module(x64):
    params, spec, adapters, _ = uni_lora()
    assert jax.tree.map(jnp.shape, split_frozen(adapters)[0]) == {
        **dict.fromkeys(SIZES, {}),
        SHARED: {"lora_theta": (LENGTH,)},
    }
    # the start is small and not the base: at most 0.02^2 / 2 in each of two products
    kept = replace(spec, target_modules=["first", "third"])
    fewer = {name: node for name, node in adapters.items() if name != "second"}
    found, whole = jit(lambda params: (merge(params, fewer, kept), merge(params, adapters, spec)))(params)
    changes = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), whole, params)
    assert all(1e-8 < change["kernel"] <= 2 * 0.02**2 / 2 for change in changes.values())
    assert largest_difference(found, {**whole, "second": params["second"]}) == 0


def vera_as_p(a, w):
    d, b = a["frozen_a"], a["frozen_b"]
    (n, r), m = d.shape, b.shape[1]
    p = np.zeros((n * r + r * m, r + m))
    for i, k in np.ndindex(n, r):
        p[i * r + k, k] = d[i, k]
    for k, j in np.ndindex(r, m):
        p[n * r + k * m + j, r + j] = b[k, j]
    return p, np.concatenate([a["lora_lambda_d"], a["lora_lambda_b"]]), 0


def tied_as_p(a, w):
    """TL5, in which u and v are ones: of this layer an identity."""
    theta = np.concatenate([a["lora_a"].ravel(), a["lora_b"].ravel()])
    return np.eye(len(theta)), theta, 0


def vblora_as_p(a, w):
    """With logits that stay; each number is here a sub-vector of its own."""
    rows = []
    for logits, turned in ((a["lora_logits_a"], True), (a["lora_logits_b"], False)):
        chosen = np.argsort(-logits, axis=-1)[..., :2]
        weights = np.exp(np.take_along_axis(logits, chosen, -1))
        row = np.zeros(logits.shape)
        np.put_along_axis(row, chosen, weights / weights.sum(-1, keepdims=True), -1)
        rows.append((row.swapaxes(0, 1) if turned else row).reshape(-1, logits.shape[-1]))
    return np.concatenate(rows), a["lora_bank"].ravel(), 0


def xs_as_p(a, w):
    """vec(R B) = (I kron B^T) vec(R), row after row; A is a constant."""
    fixed, b = a["frozen_a"], a["frozen_b"]
    r, n = len(b), fixed.size
    p = np.zeros((n + b.size, r * r))
    p[n:] = np.kron(np.eye(r), b.T)
    return p, a["lora_r"].ravel(), np.concatenate([fixed.ravel(), np.zeros(b.size)])


@pytest.mark.parametrize(
    "name,as_p", [("vera", vera_as_p), ("tied_lora", tied_as_p), ("vblora", vblora_as_p), ("lora_xs", xs_as_p)]
)
def test_other_parametrisations_are_other_projections(name, as_p, x64):
    """All numbers of the pair are ``P theta`` (Uni-LoRA, section 3.1): the change is that of the member itself."""
    w, adapter, _ = one(name, dtype=jnp.float64)
    if name == "tied_lora":
        adapter = {**adapter, **{key: jnp.ones_like(adapter[key]) for key in ("lora_u", "lora_v")}}
    p, theta, fixed = as_p(jax.tree.map(np.asarray, adapter), w)
    numbers, (n, m) = fixed + p @ theta, w.shape
    a, b = np.split(numbers, [n * (len(numbers) // (n + m))])
    pair = plain(name, w, adapter)
    np.testing.assert_allclose(a.reshape(n, -1) @ b.reshape(-1, m), pair["lora_a"] @ pair["lora_b"], atol=1e-12)


def test_lortas_changes_are_slices_of_one_tensor():
    """With four heads; what one layer's row of its factor is touches that layer alone."""
    _, params = tiny_decoder()
    chosen = {"rank": 3, "target_modules": ["q_proj", "o_proj"], "scaling": "none"}
    spec = LoraSpec(parametrization="lorta", options={"heads": 4}, **chosen)
    adapters = moved(init_adapters(jax.random.key(0), params, spec))
    merged = jit(lambda adapters: merge(params, adapters, spec))
    c = {name.removeprefix("lora_"): np.asarray(leaf) for name, leaf in adapters[SHARED].items()}
    assert {name: leaf.shape for name, leaf in c.items()} == {
        "in": (16, 3), "head_dim": (4, 3), "heads": (4, 3), "layers": (3, 3), "types": (2, 3)
    }  # fmt: skip
    tensor = np.einsum("aq,bq,hq,lq,tq->tlahb", *(c[key] for key in ("in", "head_dim", "heads", "layers", "types")))

    def changes(adapters):
        after, before = (whole["model"]["layers"]["self_attn"] for whole in (merged(adapters), params))
        return np.stack([after[m]["kernel"] - before[m]["kernel"] for m in ("o_proj", "q_proj")])

    np.testing.assert_allclose(changes(adapters), tensor.reshape(2, 3, 16, 16), atol=1e-5)
    layers = adapters[SHARED]["lora_layers"]
    other = {**adapters, SHARED: {**adapters[SHARED], "lora_layers": layers.at[1].multiply(2)}}
    differ = np.abs(changes(other) - changes(adapters)).max((0, 2, 3))
    assert differ[1] > 1e-3 and not differ[[0, 2]].any()


def numbered(sizes):
    return {"layers": {str(i): {"fc": {"kernel": jnp.ones(size)}} for i, size in enumerate(sizes)}}


EXPERTS = {name: {"kernel": jnp.ones((2, 2))} for name in "01"}


@pytest.mark.parametrize(
    "name,options,params,message",
    [
        ("tied_lora", {}, numbered([(4, 4), (4, 5)]), "layers.0.fc .* and layers.1.fc .* cannot share a pair"),
        ("lorta", {}, kernels(SIZES), "are no slices of one tensor: target modules of one size"),
        ("lorta", {"heads": 3}, numbered([(4, 4)]), "3 heads do not divide the 4 outputs"),
        ("lorta", {}, {"layers": {"0": {"experts": EXPERTS}}}, "would be the same slice: exclude one"),
        ("unilora", {}, numbered([(4, 4)]), "length 256 is more than the 16 numbers of all pairs"),
        ("vblora", {"length": 3}, numbered([(4, 4)]), "length 3 does not divide both sides of a kernel"),
    ],
)
def test_modules_that_cannot_share_are_refused_by_name(name, options, params, message):
    spec = LoraSpec(parametrization=name, rank=2, target_modules=r".*", options=options, stacked=("layers",))
    with pytest.raises(InputError, match=message):
        init_adapters(jax.random.key(0), params, spec)


SHARING = sorted(SHARED_COUNT)


@pytest.mark.parametrize("name", SHARING)
def test_shared_leaves_are_shown_and_frozen_by_their_names(name):
    _, params = tiny_decoder()
    spec = spec_of(name, rank=2, target_modules=["q_proj", "o_proj"])
    adapters = init_adapters(jax.random.key(0), params, spec)
    trained = split_frozen(adapters)[0]
    rows = [line.split()[0] for line in describe(params, adapters, spec).splitlines()]
    shared = [".".join((SHARED, *path)) for path in tree.leaves_by_path(trained[SHARED])]
    assert shared and set(shared) <= set(rows)
    if name in ("tied_lora", "vblora"):
        mask = freeze_mask(params, adapters, spec, [SHARED])
        assert all(leaf.all() for leaf in jax.tree.leaves(mask[SHARED]))
        assert not any(leaf.any() for leaf in jax.tree.leaves(mask["model"]))
        assert jax.tree.structure(mask) == jax.tree.structure(trained)
        total = lambda own: sum(jnp.sum(x) for x in jax.tree.leaves(stop_frozen_gradients(own, mask)))
        gradient = jax.grad(total)(trained)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient[SHARED]))
        assert all(np.all(leaf) for leaf in jax.tree.leaves(gradient["model"]))
    elif len(shared) == 1:
        with pytest.raises(InputError, match="leave nothing to train"):
            freeze_mask(params, adapters, spec, ["lora_theta"])
    else:
        mask = freeze_mask(params, adapters, spec, ["lora_heads"])
        assert [key for key, leaf in mask[SHARED].items() if leaf.all()] == ["lora_heads"]


@pytest.mark.parametrize("name", SHARING)
def test_what_takes_plain_pairs_names_the_way_out(name):
    _, params = tiny_decoder()
    spec = spec_of(name, rank=2, target_modules=["q_proj", "o_proj"])
    adapters = init_adapters(jax.random.key(0), params, spec)
    with pytest.raises(InputError, match="to_lora"):
        combine([(adapters, spec)] * 2, [1.0, 1.0], "linear")
    with pytest.raises(InputError, match="to_lora"):
        make_bank(params, [(adapters, spec)])
    plain = to_lora(jax.device_get(adapters), spec, params=params)
    assert make_bank(params, [plain]).size == 1


def test_every_member_that_shares_has_its_count():
    from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS

    assert SHARING == sorted(name for name in MEMBERS if hasattr(PARAMETRIZATIONS[name], "share"))
