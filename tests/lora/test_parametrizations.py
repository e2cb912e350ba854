"""The laws of a parametrisation, for every member, and float64 transcriptions of what each computes."""

import contextlib
import io
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from stablelora_jax import LoraSpec, adapted, describe, init_adapters, merge, split_frozen, to_lora, with_frozen
from stablelora_jax.lora.dense import changed_kernel, is_dense
from stablelora_jax.lora.initializers import INITIALIZERS
from stablelora_jax.lora.leaves import leaf_shapes
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.parametrizations.lora import Keys
from stablelora_jax.lora.parametrizations.select import drawn_of_many
from stablelora_jax.lora.parametrizations.unilora import permuted
from stablelora_jax.lora.shared import share, shared_by, shared_shapes
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from tests.helpers import jit, largest_difference, long, random_params, tiny_decoder
from tests.lora.foreign.test_function_cases import sizes

IN, OUT, R, STACK = 7, 5, 3, 4


# Each oracle is NumPy in float64, of a kernel w (in, out) and the leaves of one adapter.


def lora_oracle(w, a, s):
    start = a["frozen_a"] @ a["frozen_b"] if "frozen_a" in a else 0
    return w + s * (a["lora_a"] @ a["lora_b"] - start)


def rescaled(changed, magnitudes):
    return changed / np.sqrt((changed**2).sum(0, keepdims=True)) * magnitudes[None]


def dora_oracle(w, a, s):
    return rescaled(lora_oracle(w, a, s), a["lora_magnitude_vector"])


def adalora_oracle(w, a, s):
    return w + s * a["lora_a"] @ np.diag(a["lora_e"]) @ a["lora_b"]


def xs_oracle(w, a, s):
    return w + s * a["frozen_a"] @ a["lora_r"] @ a["frozen_b"]


def edora_oracle(w, a, s):
    return rescaled(xs_oracle(w, a, s), a["lora_magnitude_vector"])


def slora_oracle(w, a, s):
    return w + s * a["lora_a"] @ a["lora_n"] @ a["lora_b"]


def inttune_oracle(w, a, s):
    return w + s * a["frozen_a"] @ (a["lora_n"] - a["frozen_n"]) @ a["frozen_b"]


def miss_oracle(w, a, s):
    return w + s * np.stack([a["lora_d"][i % len(a["lora_d"])] for i in range(len(w))])


def mini_oracle(w, a, s):
    """PEFT's rule, entry by entry."""
    (rank, width), d = a["lora_d"].shape, a["lora_d"]
    return w + s * np.array([[d[i % rank, j % width] for j in range(w.shape[1])] for i in range(len(w))])


def rows_oracle(w, a, s):
    changed = w.copy()
    changed[a["frozen_index"]] += s * a["lora_rows"]
    return changed


def columns_oracle(w, a, s):
    changed = w.copy()
    changed[:, a["frozen_index"]] += s * a["lora_columns"]
    return changed


def paca_oracle(w, a, s):
    """The rows are trained themselves; where they moved is what counts beside the rows that ``w`` has here."""
    changed = w.copy()
    changed[a["frozen_index"]] += s * (a["lora_rows"] - a["frozen_rows"])
    return changed


def loldu_oracle(w, a, s):
    moved = a["lora_z"] - a["frozen_z"]
    return w + s * sum(m * np.outer(u, pl) for m, u, pl in zip(moved, a["frozen_a"].T, a["frozen_b"], strict=True))


def vera_oracle(w, a, s):
    return w + s * (a["frozen_a"] * a["lora_lambda_d"]) @ (a["frozen_b"] * a["lora_lambda_b"])


def randlora_oracle(w, a, s):
    wide, thin, lam, gamma = (a[name] for name in ("frozen_wide", "frozen_thin", "lora_lambda", "lora_gamma"))
    (rank, count), terms = lam.shape, range(lam.shape[1])
    wide = wide.reshape(-1, rank, count)
    change = sum(wide[:, :, i] @ np.diag(lam[:, i]) @ thin @ np.diag(gamma[i]) for i in terms)
    return w + s * (change if w.shape[0] > w.shape[1] else change.T)


def shira_oracle(w, a, s):
    changed = w.copy()
    changed.reshape(-1)[a["frozen_index"]] += s * a["lora_values"]
    return changed


def bat_oracle(w, a, s):
    """By blocks of the transposed kernel, as PEFT's weight lies: W' = W + s (W b + b)."""
    weight, b = w.T, a["lora_blocks"]
    r = b.shape[1]
    changed = weight.copy()
    for o, i in itertools.product(range(0, weight.shape[0], r), range(0, weight.shape[1], r)):
        block = weight[o : o + r, i : i + r]
        changed[o : o + r, i : i + r] += s * (block @ b[o // r] + b[o // r])
    return changed.T


def salt_oracle(w, a, s):
    """The whole matrix between the singular vectors, as it is written in the paper."""
    u, vt, top = a["frozen_u"], a["frozen_v"], len(a["lora_alpha"])
    middle = np.diag(np.linalg.svd(w)[1])
    change = np.zeros_like(middle)
    scaled = np.maximum((1 + a["lora_alpha"]) * np.diag(middle)[:top] + a["lora_beta"], 0)
    change[:top, :top] = np.diag(scaled) - middle[:top, :top]
    change[top:, top:] = a["lora_x"] @ a["lora_y"]
    return w + s * u @ change @ vt


def mpo(a, kind):
    """Of three cores, every sum at once."""
    cores = [a[f"{kind}_core_{k}"] for k in (1, 2, 3)]
    whole = np.einsum("zadp,pbeq,qcfy->abcdef", *cores)
    return whole.reshape(math.prod(whole.shape[:3]), -1)


def dota_oracle(w, a, s):
    return w + s * (mpo(a, "lora") - mpo(a, "frozen"))


def dota_count(n, m, r):
    """Of the sides of the kernels of a small decoder."""
    cut = {16: (4, 2, 2), 24: (4, 3, 2), 32: (4, 4, 2)}
    (i, j, k), (x, y, z) = cut[n], cut[m]
    first, second = min(r, i * x, j * y * k * z), min(r, r * j * y, k * z)
    return i * x * first + first * j * y * second + second * k * z


def cp_oracle(w, a, s):
    """Each number of the kernel by itself; of one axis where the kernel contracts one."""
    factors = [a[f"lora_in_{at}"] for at in range(sum(name.startswith("lora_in_") for name in a))]
    change = np.zeros((*(len(f) for f in factors), w.shape[1]))
    for at in np.ndindex(*change.shape[:-1]):
        row = np.prod([factor[i] for factor, i in zip(factors, at, strict=True)], axis=0)
        change[at] = row @ a["lora_out"]
    return w + s * change.reshape(w.shape)


def lora_c_oracle(w, a, s):
    """``(B @ A).view(out, in, k, k)``, from PyTorch's order of axes to ours."""
    product, outputs = a["lora_up"] @ a["lora_down"], w.shape[1]
    side = len(a["lora_up"]) // outputs
    return w + s * product.reshape(outputs, -1, side, side).transpose(2, 3, 1, 0).reshape(w.shape)


def tied_oracle(w, a, s):
    return w + s * a["lora_a"] @ np.diag(a["lora_u"]) @ a["lora_b"] @ np.diag(a["lora_v"])


def lorta_oracle(w, a, s):
    """The slice of the tensor, entry by entry."""
    layer, kind = a["lora_layers"][a["frozen_layer"]], a["lora_types"][a["frozen_type"]]
    factors = (a[f"lora_{name}"] for name in ("in", "heads", "head_dim"))
    return w + s * np.einsum("aq,hq,bq,q,q->ahb", *factors, layer, kind).reshape(w.shape)


def vblora_oracle(w, a, s):
    """Each number of A and B is here a sub-vector of its own."""
    topk, bank = 2, a["lora_bank"]

    def composed(logits):
        chosen = np.argsort(-logits, axis=-1)[..., :topk]
        weights = np.exp(np.take_along_axis(logits, chosen, -1))
        weights /= weights.sum(-1, keepdims=True)
        return (weights[..., None] * bank[chosen]).sum(-2).reshape(len(logits), -1)

    return w + s * composed(a["lora_logits_a"]).T @ composed(a["lora_logits_b"])


def unilora_oracle(w, a, s):
    """With the list of what each number of the pair is, as PEFT writes it down."""
    total, length = int(a["frozen_total"]), len(a["lora_theta"])
    columns = np.asarray(permuted(jnp.arange(total, dtype=jnp.uint32), a["frozen_total"], a["frozen_seed"])) % length
    numbers = (a["lora_theta"] / np.sqrt(np.bincount(columns)))[columns].reshape(-1, sum(w.shape))
    return w + s * numbers[:, : len(w)].T @ numbers[:, len(w) :]


# name: the changed kernel in float64, numbers trained at a kernel (n, m) with rank r, which init
MEMBERS = {
    "lora": (lora_oracle, lambda n, m, r: r * (n + m), "kaiming"),
    "dora": (dora_oracle, lambda n, m, r: r * (n + m) + m, "kaiming"),
    "adalora": (adalora_oracle, lambda n, m, r: r * (n + m + 1), "init_ab"),
    "bat": (bat_oracle, lambda n, m, r: r * m, "kaiming"),
    "cp": (cp_oracle, lambda n, m, r: r * (n + m), "kaiming"),
    "cp_dora": (
        lambda w, a, s: rescaled(cp_oracle(w, a, s), a["lora_magnitude_vector"]),
        lambda n, m, r: r * (n + m) + m,
        "kaiming",
    ),
    "dora_c": (
        lambda w, a, s: rescaled(lora_c_oracle(w, a, s), a["lora_magnitude_vector"]),
        lambda n, m, r: r * (n + m) + m,
        "kaiming",
    ),
    "dota": (dota_oracle, dota_count, "kaiming"),
    "edora": (edora_oracle, lambda n, m, r: r * r + m, "svd"),
    "inttune": (inttune_oracle, lambda n, m, r: r * r, "nystrom"),
    "loldu": (loldu_oracle, lambda n, m, r: r, "kaiming"),
    "lora_c": (lora_c_oracle, lambda n, m, r: r * (n + m), "kaiming"),
    "lora_xs": (xs_oracle, lambda n, m, r: r * r, "svd"),
    "lorta": (lorta_oracle, lambda n, m, r: 0, "kaiming"),
    "miss": (miss_oracle, lambda n, m, r: r * m, "kaiming"),
    "miss_mini": (mini_oracle, lambda n, m, r: r * 1, "kaiming"),
    "paca": (paca_oracle, lambda n, m, r: r * m, "kaiming"),
    "randlora": (randlora_oracle, lambda n, m, r: math.ceil(min(n, m) / r) * (r + min(n, m)), "kaiming"),
    "reslora": (lora_oracle, lambda n, m, r: r * (n + m), "kaiming"),  # of one layer alone
    "salt": (salt_oracle, lambda n, m, r: 2 * 2 + 2 * r * (min(n, m) - 2), "kaiming"),
    "sbora_fa": (rows_oracle, lambda n, m, r: r * m, "kaiming"),
    "sbora_fb": (columns_oracle, lambda n, m, r: r * n, "kaiming"),
    "shira": (shira_oracle, lambda n, m, r: r * (n + m), "kaiming"),
    "slora": (slora_oracle, lambda n, m, r: r * (n + m) + r * r, "kaiming"),
    "tied_lora": (tied_oracle, lambda n, m, r: r + m, "kaiming"),
    "unilora": (unilora_oracle, lambda n, m, r: 0, "kaiming"),
    "vblora": (vblora_oracle, lambda n, m, r: r * (n + m) * 6, "kaiming"),
    "vera": (vera_oracle, lambda n, m, r: r + m, "kaiming"),
}
NOISE = {
    "lora_xs": 1e-3,
    "edora": 1e-3,
    "vblora": 2e-2,
    "unilora": 1e-3,
}  # at the start: N(0, 1e-5^2) between two bases; a small pair
LINKED = ("reslora",)  # whose layers of a stack use each other's
OPTIONS = {"salt": {"k": 2}, "vblora": {"vectors": 6, "length": 1}, "unilora": {"length": 16}}
# numbers trained once for all modules, or for all of a kind
SHARED_COUNT = {
    "vblora": 6,
    "unilora": 16,
    "tied_lora": 4 * (32 + 40 + 48),
    "lorta": 4 * (16 + 16 + 1 + 3 + 2),  # in, out, heads, layers, types
}
CHOSEN = {"lorta": ["q_proj", "o_proj"]}  # where all kernels have one size
RANKS = {"shira": 1}  # where R is more than a small kernel has
# where R has to divide both sides, or primes are not to be cut; (in, out) of convolutions
SIZES = {"bat": (6, 9), "dota": (6, 8), "cp": (12, 5), "cp_dora": (12, 5), "lora_c": (12, 5), "dora_c": (12, 5)}
AXES = {"cp": (2, 3, 2), "cp_dora": (2, 3, 2), "lora_c": (2, 2, 3), "dora_c": (2, 2, 3)}  # (h, w, in)


def spec_of(name, **more):
    return LoraSpec(parametrization=name, init=MEMBERS[name][2], options=OPTIONS.get(name, {}), **more)


def one(name, size=None, dtype=jnp.float32, seed=1):
    """A kernel, the leaves of a trained adapter with whatever is drawn from seeds drawn, and a scale."""
    size = size or SIZES.get(name, (IN, OUT))
    rng = np.random.default_rng(seed)
    w, scale = jnp.asarray(rng.normal(size=size), dtype), jnp.asarray(0.5 + rng.random(), dtype)
    keys = Keys(jax.random.key(seed), jax.random.key(0))
    rank, spec = RANKS.get(name, R), spec_of(name)
    begun = INITIALIZERS[spec.init](keys.own, w, rank, scale, dtype)
    axes = AXES.get(name, ()) if size == SIZES.get(name) else size[:1]  # turned, it is no convolution
    arguments = spec.arguments | ({"axes": axes} if name in AXES else {})
    adapter = PARAMETRIZATIONS[name].start(keys, w, begun, scale, **arguments)
    target = TargetModule(("m",), ("m",), (), (rank,), (1.0,), size)
    whole = share(keys.shared, {"m": adapter}, {("m",): target}, spec, dtype)
    adapter = whole["m"] | shared_by(whole, ("m",), spec)
    if name in ("vera", "randlora"):  # as an adapter of PEFT's brings its own
        adapter.pop("frozen_seed")
        small, terms = min(size), math.ceil(min(size) / R)
        shapes = {"vera": {"a": (size[0], R), "b": (R, size[1])}}.get(name)
        shapes = shapes or {"wide": (max(size), R * terms), "thin": (R, small)}
        adapter |= {f"frozen_{key}": jnp.asarray(rng.normal(size=shape), dtype) for key, shape in shapes.items()}
    moved = lambda key, x: x if key.startswith("frozen_") else x + jnp.asarray(rng.normal(size=x.shape), dtype) / 3
    return w, {key: moved(key, leaf) for key, leaf in adapter.items()}, scale


def plain(name, w, adapter):
    return PARAMETRIZATIONS[name].pair(adapter, w.shape, **spec_of(name).arguments)


def path(name, x, w, adapter, scale):
    if is_dense(spec_of(name)):
        return x @ merged(name, w, adapter, scale)
    member, pair = PARAMETRIZATIONS[name], plain(name, w, adapter)
    gain = member.gain(w, pair, scale)
    return (1 if gain is None else gain[None]) * (x @ w + member.delta(x @ pair["lora_a"], pair, scale))


def merged(name, w, adapter, scale):
    found = adapter if is_dense(spec_of(name)) else plain(name, w, adapter)
    return changed_kernel(w, found, scale, spec_of(name))


def test_every_member_has_a_row():
    assert MEMBERS.keys() == PARAMETRIZATIONS.keys()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_path_equals_merging_equals_the_transcription(name, turned, x64):
    size = SIZES.get(name, (IN, OUT))
    w, adapter, scale = one(name, size[::-1] if turned else size, jnp.float64)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, len(w))))
    found = merged(name, w, adapter, scale)
    oracle = MEMBERS[name][0](np.asarray(w), jax.tree.map(np.asarray, adapter), float(scale))
    np.testing.assert_allclose(found, oracle, atol=1e-12)
    np.testing.assert_allclose(path(name, x, w, adapter, scale), x @ found, atol=1e-12)
    assert largest_difference(found, w) > 1e-3
    low = w.astype(jnp.bfloat16)  # a base in bfloat16 is changed at least in float32, and rounded once
    rounded, wide = merged(name, low, adapter, scale), merged(name, low.astype(jnp.float32), adapter, scale)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", [long(n) if n in AXES else n for n in MEMBERS])  # of Dense alone they are LoRA
def test_in_a_decoder(name):
    """The start is the base, the count is the formula, the model computes what merging means, and to_lora is the same.

    Of the kernels (3, in, out) of q_proj one is not adapted.
    """
    model, params = tiny_decoder(vocab_size=32)
    chosen = CHOSEN.get(name, ["q_proj", "down_proj"] + ["embed_tokens"] * (name not in LINKED))
    sizes = {
        "q_proj": [(16, 16)] * 2,
        "o_proj": [(16, 16)] * 3,
        "down_proj": [(24, 16)] * 3,
        "embed_tokens": [(32, 16)],
    }
    spec = spec_of(name, rank=4, target_modules=chosen, exclude_modules=["layers.2.self_attn.q_proj"], scaling="rslora")
    start = jit(lambda params: init_adapters(jax.random.key(0), params, spec))(params)
    q_proj = ("model", "layers", "self_attn", "q_proj")
    assert all(not np.any(leaf[2]) for leaf in tree.get_in(start, q_proj).values())
    count = sum(MEMBERS[name][1](*size, 4) for module in chosen for size in sizes[module])
    assert f"trainable params: {count + SHARED_COUNT.get(name, 0):,} ||" in describe(params, start, spec)

    merged = jit(lambda adapters: merge(params, adapters, spec))
    assert largest_difference(merged(start), params) < NOISE.get(name, 1e-6)
    adapters = moved(start)
    kept = {key: leaf.at[2].set(0) for key, leaf in tree.get_in(adapters, q_proj).items()}  # gets no gradient
    adapters = tree.set_in(adapters, q_proj, kept)
    whole, tokens = merged(adapters), jnp.arange(10).reshape(2, 5)
    assert largest_difference(whole, params) > 1e-3
    lora = adapted(model, spec)
    apply = jit(lambda adapters: lora.apply({"params": params, "lora": adapters}, tokens))
    apply(start)
    found = apply(adapters)
    assert apply._cache_size() == 1
    np.testing.assert_allclose(found, jit(model.apply)({"params": whole}, tokens), atol=1e-4)

    plain_adapters, plain_spec = to_lora(adapters, spec, params=params)
    assert plain_spec.parametrization == ("dora" if "dora" in name else "lora")
    assert largest_difference(jit(lambda a: merge(params, a, plain_spec))(plain_adapters), whole) < 1e-5


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in LINKED])
def test_a_stack_starts_as_its_layers(name):
    """As the same kernels with the same names, one at a time."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, *SIZES.get(name, (IN, OUT)))), jnp.float32)
    stacked = {"model": {"layers": {"q_proj": {"kernel": kernel}}}}
    spec = spec_of(name, rank=RANKS.get(name, R), target_modules=["q_proj"], stacked=("layers",))
    found = init_adapters(jax.random.key(0), stacked, spec)["model"]["layers"]["q_proj"]
    apart = {"model": {"layers": {str(i): {"q_proj": {"kernel": kernel[i]}} for i in range(2)}}}
    layers = init_adapters(jax.random.key(0), apart, spec)["model"]["layers"]
    for i in range(2):
        for key, leaf in layers[str(i)]["q_proj"].items():
            np.testing.assert_allclose(found[key][i], leaf, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_reach_what_is_trained_alone_and_are_finite_differences(name, x64):
    """Of DoRA's of the function whose norms are held fixed (section 4.3)."""
    w, adapter, scale = one(name, dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, len(w))))
    member, trained, dense = PARAMETRIZATIONS[name], split_frozen(adapter)[0], is_dense(spec_of(name))
    gain = None if dense else member.gain(w, plain(name, w, adapter), scale)
    norms = 1.0 if gain is None else adapter["lora_magnitude_vector"] / gain

    def held(own):
        if dense:
            return jnp.square(path(name, x, w, {**adapter, **own}, scale)).sum()
        pair = plain(name, w, {**adapter, **own})
        c = pair.get("lora_magnitude_vector", 1.0) / norms
        return jnp.square(jnp.reshape(c, (1, -1)) * (x @ w + scale * (x @ pair["lora_a"]) @ pair["lora_b"])).sum()

    found = jax.grad(lambda own: jnp.square(path(name, x, w, {**adapter, **own}, scale)).sum())(trained)
    held = jax.jit(held)
    for key, leaf in trained.items():
        for i in range(0, leaf.size, 4):
            step = jnp.zeros(leaf.size).at[i].set(1e-6).reshape(leaf.shape)
            difference = (held({**trained, key: leaf + step}) - held({**trained, key: leaf - step})) / 2e-6
            np.testing.assert_allclose(found[key].ravel()[i], difference, rtol=1e-4, atol=1e-6)


# Llama-3.2-3B with q_proj 3072 -> 3072 and v_proj 3072 -> 1024 in 28 layers: the counts of PEFT's own benchmark
@pytest.mark.parametrize(
    "name,rank,count",
    [
        ("lora", 32, 9_175_040),
        ("dora", 32, 9_289_728),
        ("miss", 64, 7_340_032),
        ("adalora", 64, 18_353_664),
        ("randlora", 32, 9_289_728),
        ("vera", 256, 129_024),
        ("sbora_fa", 32, 3_670_016),  # that of LoRA-FA
        ("bat", 64, 7_340_032),
        ("shira", 32, 9_175_040),
        ("vblora", 4, 1_212_416),
        ("unilora", 4, 256),
    ],
)
def test_counts_are_those_of_pefts_benchmark(name, rank, count):
    spec, targets = LoraSpec(parametrization=name, init=MEMBERS[name][2], rank=rank), {}
    for module, size in (("q_proj", (3072, 3072)), ("v_proj", (3072, 1024))):
        names = tuple(f"layers.{i}.{module}" for i in range(28))
        path = ("layers", module)
        targets[path] = TargetModule(path, names, (28,), (rank,) * 28, (1.0,) * 28, size)
    own = [
        shape for target in targets.values() for key, shape in leaf_shapes(target, spec).items() if key[:5] == "lora_"
    ]
    shared = [shape for path, shape in shared_shapes(targets, spec).items() if path[-1].startswith("lora_")]
    assert sum(map(math.prod, [*own, *shared])) == count


def test_to_lora_cuts_to_the_best_approximation_of_a_rank():
    _, params = tiny_decoder()
    spec = LoraSpec(rank=4, target_modules=["q_proj"], init="pissa")
    adapters = moved(init_adapters(jax.random.key(0), params, spec))
    own = jax.tree.map(np.asarray, adapters["model"]["layers"]["self_attn"]["q_proj"])
    change = own["lora_a"] @ own["lora_b"] - own["frozen_a"] @ own["frozen_b"]
    u, s, vt = np.linalg.svd(change.astype(np.float64))
    best = u[..., :3] * s[:, None, :3] @ vt[:, :3]
    cut, cut_spec = to_lora(adapters, spec, rank=3, params=params)
    kernel = lambda params: params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    found = kernel(merge(params, cut, cut_spec)) - kernel(params)
    np.testing.assert_allclose(found, spec.scale_of("q_proj") * best, atol=1e-5)
    assert cut_spec.rank == 3


def moved(adapters, seed=3):
    """The adapters after some training."""
    trained, frozen = split_frozen(adapters)
    leaves, structure = jax.tree.flatten(trained)
    rng = np.random.default_rng(seed)
    leaves = [x + jnp.asarray(rng.normal(size=x.shape) / 10, x.dtype) for x in leaves]
    return with_frozen(jax.tree.unflatten(structure, leaves), frozen)


def test_layers_of_a_stack_have_one_rank_where_nothing_can_be_padded():
    _, params = tiny_decoder()
    spec = spec_of("miss", rank=4, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2})
    with pytest.raises(InputError, match="have one rank"):
        init_adapters(jax.random.key(0), params, spec)


def test_miss_sums_the_shards_of_its_input(x64):
    w, adapter, _ = one("miss", dtype=jnp.float64)
    x = np.random.default_rng(2).normal(size=(6, IN))
    padded = np.pad(x, [(0, 0), (0, -IN % R)]).reshape(6, -1, R)
    np.testing.assert_allclose(x @ plain("miss", w, adapter)["lora_a"], padded.sum(1), atol=1e-12)


def test_paca_starts_with_rows_of_the_kernel():
    w, _, scale = one("paca")
    begun = INITIALIZERS["kaiming"](jax.random.key(0), w, R, scale, jnp.float32)
    start = PARAMETRIZATIONS["paca"].start(Keys(jax.random.key(0), jax.random.key(0)), w, begun, scale)
    np.testing.assert_allclose(scale * start["lora_rows"], w[start["frozen_index"]], rtol=1e-6)
    assert len(set(np.asarray(start["frozen_index"]).tolist())) == R


@pytest.mark.parametrize("size", [(IN, OUT), (OUT, IN)])
def test_loldus_factors_are_those_of_the_kernel(size, x64):
    import scipy.linalg

    w, _, scale = one("loldu", size, jnp.float64)
    rank = min(size)
    begun = INITIALIZERS["kaiming"](jax.random.key(0), w, rank, scale, jnp.float64)
    start = PARAMETRIZATIONS["loldu"].start(Keys(jax.random.key(0), jax.random.key(0)), w, begun, scale)
    np.testing.assert_allclose((start["frozen_a"] * start["frozen_z"][None]) @ start["frozen_b"], w, atol=1e-12)
    p, lower, upper = scipy.linalg.lu(np.asarray(w).T)
    np.testing.assert_allclose(start["frozen_b"], (p @ lower).T[:rank], atol=1e-12)
    np.testing.assert_allclose(start["frozen_z"], np.diagonal(upper), atol=1e-12)


@pytest.mark.parametrize("name", ["vera", "randlora"])
def test_modules_of_one_size_share_their_random_factors(name):
    w, _, scale = one(name)
    begun = INITIALIZERS["kaiming"](jax.random.key(0), w, R, scale, jnp.float32)
    start = lambda own, shared: PARAMETRIZATIONS[name].start(
        Keys(jax.random.key(own), jax.random.key(shared)), w, begun, scale
    )
    ones = lambda a: {key: leaf if key.startswith("frozen_") else jnp.ones_like(leaf) for key, leaf in a.items()}
    first, second, other = (plain(name, w, ones(a)) for a in (start(0, 5), start(1, 5), start(0, 6)))
    assert largest_difference(first, second) == 0
    assert largest_difference(first, other) > 0.1


def test_randlora_has_full_rank(x64):
    w, adapter, scale = one("randlora", dtype=jnp.float64)
    assert np.linalg.matrix_rank(merged("randlora", w, adapter, scale) - w) == min(w.shape)


def test_randlora_scales_the_smaller_side_and_of_a_square_kernel_the_inputs():
    """As PEFT does, whose adapters of square kernels would otherwise mean the transpose."""
    for size, scaled in (((IN, OUT), "lora_b"), ((OUT, IN), "lora_a"), ((IN, IN), "lora_a")):
        w, adapter, _ = one("randlora", size)
        first, second = (plain("randlora", w, {**adapter, "lora_gamma": c * adapter["lora_gamma"]}) for c in (1, 2))
        assert [key for key in first if largest_difference(first[key], second[key]) > 0] == [scaled]


def test_doras_magnitude_is_the_norm_of_each_output():
    w, adapter, scale = one("dora")
    found = merged("dora", w, adapter, scale)
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=0), jnp.abs(adapter["lora_magnitude_vector"]), rtol=1e-5)
    twice = {**adapter, "lora_magnitude_vector": 2 * adapter["lora_magnitude_vector"]}
    np.testing.assert_allclose(merged("dora", w, twice, scale), 2 * found, rtol=1e-5)
    longer = {**adapter, "lora_a": 3 * adapter["lora_a"]}  # only the direction of W0 + s A B counts
    np.testing.assert_allclose(merged("dora", 3 * w, longer, scale), found, rtol=1e-4, atol=1e-5)


def test_dora_leaves_columns_of_zeros_and_padding_alone():
    w, adapter, scale = one("dora")
    adapter = {**adapter, "lora_b": adapter["lora_b"].at[:, 2].set(0)}
    keys = Keys(jax.random.key(0), jax.random.key(0))
    begun = {key: adapter[key] for key in ("lora_a", "lora_b")}
    start = PARAMETRIZATIONS["dora"].start(keys, w.at[:, 2].set(0), begun, scale)
    found = PARAMETRIZATIONS["dora"].merge(w.at[:, 2].set(0), {**adapter, **start}, scale)
    assert np.isfinite(found).all() and not found[:, 2].any()
    padded = {"lora_a": jnp.zeros((IN, R)), "lora_b": jnp.zeros((R, OUT)), "lora_magnitude_vector": jnp.zeros(OUT)}
    np.testing.assert_array_equal(PARAMETRIZATIONS["dora"].merge(w, padded, scale), w)


def test_bat_refuses_a_rank_that_does_not_divide_both_sides():
    params = {"m": {"kernel": jnp.ones((6, 8))}}
    with pytest.raises(InputError, match=r"^m: bat cuts a kernel \(6, 8\) into blocks of 3 x 3"):
        init_adapters(jax.random.key(0), params, spec_of("bat", rank=3, target_modules=["m"], stacked=()))


@pytest.mark.parametrize("size,count", [(8, 2), (50, 40)])
def test_a_draw_of_many_is_uniform_over_sets(size, count):
    """Of every number as often, and of 2 of 8 of every pair as often: by chi-square, at five deviations."""
    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    found = np.asarray(jit(jax.vmap(lambda key: drawn_of_many(key, size, count)))(keys))
    assert (np.diff(found, axis=1) > 0).all() and found.min() >= 0 and found.max() < size
    assert surprise(np.bincount(found.reshape(-1), minlength=size)) < 5
    if count == 2:
        pairs = [size * a + b for a, b in itertools.combinations(range(size), 2)]
        assert surprise(np.bincount(found @ [size, 1], minlength=size**2)[pairs]) < 5


def surprise(counts):
    """By how many deviations chi-square is above its mean, were all counts equal but for chance."""
    expected = counts.sum() / len(counts)
    return (np.square(counts - expected).sum() / expected - len(counts)) / (2 * len(counts)) ** 0.5


def test_a_draw_of_many_needs_no_memory_for_all():
    """Of a kernel 4096 x 4096 in 32 layers: no array is as large as the kernel."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 32))
    made = jax.make_jaxpr(jax.vmap(lambda key: drawn_of_many(key, 4096**2, 8 * 8192)))(keys)
    assert max(sizes(made.jaxpr)) <= 4 * 32 * 8 * 8192


def test_salt_scales_the_largest_singular_values_alone_and_never_below_zero(x64):
    w, adapter, _ = one("salt", dtype=jnp.float64)
    u, values, vt = np.linalg.svd(np.asarray(w), full_matrices=False)
    for alpha, beta, expected in (([1.0, -0.5], [0.0, 0.0], [2.0, 0.5]), ([-3.0, 0.0], [0.0, -1e3], [0.0, 0.0])):
        own = {"lora_alpha": jnp.array(alpha), "lora_beta": jnp.array(beta), "lora_y": 0 * adapter["lora_y"]}
        found = merged("salt", w, {**adapter, **own}, jnp.ones(()))
        scaled = values * np.array([*expected, 1, 1, 1])
        np.testing.assert_allclose(found, u * scaled @ vt, atol=1e-12)


def test_salts_rest_is_not_clipped(x64):
    """What the authors' code does with X Y: half of it would be gone."""
    w, adapter, _ = one("salt", dtype=jnp.float64)
    own = {"lora_alpha": jnp.zeros(2), "lora_beta": jnp.zeros(2)}
    change = merged("salt", w, {**adapter, **own}, jnp.ones(())) - w
    between = adapter["frozen_u"][:, 2:].T @ change @ adapter["frozen_v"][2:].T
    np.testing.assert_allclose(between, adapter["lora_x"] @ adapter["lora_y"], atol=1e-12)
    assert (between < -1e-3).any()


@pytest.mark.parametrize("k,top", [(0.1, 2), (0.01, 1), (3, 3)])
def test_salts_k_is_a_part_or_a_number(k, top):
    spec = LoraSpec(parametrization="salt", rank=4, options={"k": k})
    shapes = leaf_shapes(TargetModule(("m",), ("m",), (), (4,), (1.0,), (20, 30)), spec)
    assert shapes["lora_alpha"] == (top,) and shapes["lora_x"] == (20 - top, 4)


@pytest.mark.parametrize("k", [2.5, 20, 21.0])
def test_salt_refuses(k):
    spec = LoraSpec(parametrization="salt", rank=4, options={"k": k})
    with pytest.raises(InputError, match="^m: options: k "):
        leaf_shapes(TargetModule(("m",), ("m",), (), (4,), (1.0,), (20, 30)), spec)


@pytest.mark.parametrize("rank", [2, 24])
def test_dotas_cores_are_those_of_the_kernel(rank, x64):
    """All of it where no bond is cut; else at most as far from it as what was cut at each bond."""
    w = np.random.default_rng(0).normal(size=(12, 8))
    begun = INITIALIZERS["kaiming"](jax.random.key(0), jnp.asarray(w), rank, jnp.ones(()), jnp.float64)
    adapter = PARAMETRIZATIONS["dota"].start(None, jnp.asarray(w), begun, jnp.ones(()), cores=3)
    assert [adapter[f"lora_core_{k}"].shape[1:3] for k in (1, 2, 3)] == [(3, 2), (2, 2), (2, 2)]
    left = np.linalg.norm(w - mpo(adapter, "lora"))
    tensor = w.reshape(3, 2, 2, 2, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    cut = [np.linalg.svd(tensor.reshape(rows, -1))[1][rank:] for rows in (6, 24)]
    at_most = np.linalg.norm(np.concatenate(cut))
    assert left < 1e-12 if rank == 24 else cut[1][0] < left <= at_most + 1e-12
    bonds = [adapter[f"lora_core_{k}"].shape[3] for k in (1, 2)]
    assert bonds == ([2, 2] if rank == 2 else [6, 4])


def test_dota_has_more_than_its_rank(x64):
    w, adapter, scale = one("dota", dtype=jnp.float64)
    assert np.linalg.matrix_rank(merged("dota", w, adapter, scale) - w) == min(w.shape) > R


def test_dota_needs_a_bond():
    spec = LoraSpec(parametrization="dota", rank=4, options={"cores": 1})
    with pytest.raises(InputError, match="^m: options: dota needs at least 2 cores, not 1"):
        leaf_shapes(TargetModule(("m",), ("m",), (), (4,), (1.0,), (20, 30)), spec)


@pytest.mark.parametrize("previous,init", [(1, "kaiming"), (2, "pissa"), (9, "kaiming")])
def test_reslora_adds_the_pairs_of_the_layers_before(previous, init):
    """Of five layers, of which the third is not adapted: none uses its pair, and it uses none."""
    kernel = np.random.default_rng(0).normal(size=(5, IN, OUT))
    params = {"layers": {"m": {"kernel": jnp.asarray(kernel, jnp.float32)}}}
    chosen = {"target_modules": ["m"], "exclude_modules": ["layers.2.m"], "options": {"previous": previous}}
    spec = LoraSpec(parametrization="reslora", rank=R, init=init, scaling="rslora", **chosen)
    adapters = moved(init_adapters(jax.random.key(0), params, spec))
    own = {name: np.asarray(leaf, np.float64) for name, leaf in adapters["layers"]["m"].items()}
    own = {name: leaf * (np.arange(5) != 2)[:, None, None] for name, leaf in own.items()}
    changes = [lora_oracle(0, {name: leaf[n] for name, leaf in own.items()}, spec.scale_of("m")) for n in range(5)]
    expected = [w + (n != 2) * sum(changes[max(0, n - previous) : n + 1]) for n, w in enumerate(kernel)]
    found = jit(lambda adapters: merge(params, adapters, spec))(adapters)["layers"]["m"]["kernel"]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)
    plain_adapters, plain_spec = to_lora(adapters, spec, params=params)
    assert plain_spec.rank == (1 + (init == "pissa")) * R * (min(previous, 4) + 1)
    assert not any(leaf[2].any() for leaf in plain_adapters["layers"]["m"].values())


def test_reslora_needs_a_stack():
    params = {"layers_0": {"m": {"kernel": jnp.ones((IN, OUT))}}}
    with pytest.raises(InputError, match="^layers_0.m is in no stack, whose layers reslora links"):
        init_adapters(jax.random.key(0), params, spec_of("reslora", target_modules=["m"]))


class Chain(nn.Module):
    """Two linear layers, whose own gradient needs nothing of what they are given."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(13, use_bias=False, name="second")(nn.Dense(11, use_bias=False, name="first")(x))


@pytest.mark.parametrize("name,kept", [("lora", {IN, 11, R}), ("paca", {R}), ("sbora_fa", {R}), ("miss", {R})])
def test_what_a_backward_pass_keeps(name, kept):
    """Of tokens (2, 6): LoRA keeps every feature of what a layer is given, PaCA its R chosen ones alone."""
    x = jnp.ones((2, 6, IN))
    params = random_params(Chain(), x)
    spec = spec_of(name, rank=R, target_modules=["first", "second"], stacked=())
    trained, frozen = split_frozen(init_adapters(jax.random.key(0), params, spec))
    lora, printed = adapted(Chain(), spec), io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_saved_residuals(
            lambda trained: lora.apply({"params": params, "lora": with_frozen(trained, frozen)}, x).sum(), trained
        )
    features = re.findall(r"^f32\[2,6,(\d+)\]", printed.getvalue(), re.MULTILINE)
    assert set(map(int, features)) == kept and features.count(str(R)) == 2
