"""Weighted combinations: PEFT's own on the same adapters, sums of merged kernels where that is exact, and errors."""

import copy
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, init_adapters, merge, save_peft, save_pretrained
from stablelora_jax.lora.combine import METHODS, combine
from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.names import module_names
from stablelora_jax.utils import tree
from tests.helpers import FOREIGN, random_params, tiny_decoder, trained

MODEL, PARAMS = tiny_decoder()
PAIR = dict(rank=4, target_modules=["q_proj", "o_proj"])  # two modules of one shape: few compilations
PATTERN = {"layers.1.self_attn.o_proj": 2, "q_proj": 3}
INPUTS = {
    "alike": ([LoraSpec(**PAIR), LoraSpec(**PAIR)], [0.7, 0.4]),
    "three": ([LoraSpec(**PAIR), LoraSpec(**PAIR, alpha=2), LoraSpec(**PAIR, scaling="rslora")], [0.5, 0, -0.25]),
    "negative": ([LoraSpec(**PAIR, alpha=3), LoraSpec(**PAIR, scaling="rslora")], [0.7, -0.4]),
    "targets": (
        [LoraSpec(**PAIR), LoraSpec(rank=4, target_modules=["o_proj", "down_proj"], alpha_pattern={"down_proj": 3})],
        [-0.5, 1.5],
    ),
    "expressions": (
        [LoraSpec(rank=4, target_modules=r".*q_proj"), LoraSpec(rank=4, target_modules=r".*\.[02]\..*o_proj")],
        [1, 2],
    ),
    "patterns": ([LoraSpec(**PAIR, rank_pattern=PATTERN), LoraSpec(**PAIR, rank_pattern=PATTERN, alpha=5)], [1, 0.3]),
    "rslora_first": ([LoraSpec(**PAIR, scaling="rslora"), LoraSpec(**PAIR)], [0.5, 0.5]),
    "one": ([LoraSpec(**PAIR)], [-0.3]),
    "ranks": ([LoraSpec(rank=2), LoraSpec(rank=3, scaling="rslora", target_modules=["o_proj", "q_proj"])], [0.8, -1.1]),
    "rank_patterns": (
        [
            LoraSpec(**PAIR, rank_pattern=PATTERN),
            LoraSpec(rank=2, target_modules=PAIR["target_modules"], rank_pattern={"layers.0.*q_proj": 5}),
        ],
        [0.8, 1.1],
    ),
}
COMPARED = {
    "three": METHODS,
    "one": METHODS,
    "negative": ("linear", "ties", "magnitude_prune", "cat", "svd"),
    "targets": ("linear", "ties", "dare_linear", "cat", "dare_ties_svd"),
    "expressions": ("linear", "cat"),
    "patterns": ("linear", "ties", "dare_ties", "magnitude_prune", "cat", "svd"),
    "rslora_first": ("linear", "cat", "svd"),
    "ranks": ("cat", "svd", "ties_svd"),
    "rank_patterns": ("cat", "svd", "magnitude_prune_svd"),
}
SUMS = {
    **{name: INPUTS[name] for name in ("negative", "targets", "three", "ranks", "rank_patterns")},
    "layers": ([LoraSpec(rank=2, layers_to_transform=(0, 1)), LoraSpec(rank=3, layers_to_transform=(1, 2))], [2, -1]),
    "exclude": (
        [
            LoraSpec(rank=2, exclude_modules=["layers.1.self_attn.q_proj"], alpha_pattern={"q_proj": 1}),
            LoraSpec(rank=1),
        ],
        [1, 1],
    ),
    "embedding": (
        [
            LoraSpec(rank=2, target_modules=["embed_tokens"]),
            LoraSpec(rank=1, target_modules=["embed_tokens", "q_proj"]),
        ],
        [2, 1],
    ),
    "kinds": (
        [LoraSpec(rank=2, target_modules="all-linear"), LoraSpec(rank=1, target_modules=["lm_head", "v_proj"])],
        [1, 1],
    ),
}
STACKED = ("layers", "blocks")
EXTRA = {"density": 0.6, "key": jax.random.key(3)}


def made(specs, params=PARAMS):
    return [
        (trained(init_adapters(jax.random.key(i), params, spec), spec, seed=i, size=0.1), spec)
        for i, spec in enumerate(specs)
    ]


def arguments(method, count=2):
    return {name: value for name, value in EXTRA.items() if needed(method, name)} if count > 1 else {}


def needed(method, name):
    return "dare" in method if name == "key" else any(word in method for word in ("ties", "dare", "prune"))


def by_name(adapters, spec):
    """A (in, r) and B (r, out) of every module, without padding."""
    found = {}
    for path, target in adapter_target_modules(adapters, spec).items():
        pair = tree.get_in(adapters, path)
        a, b = (np.asarray(pair[leaf]).reshape(-1, *pair[leaf].shape[-2:]) for leaf in ("lora_a", "lora_b"))
        for i, (name, rank) in enumerate(zip(target.names, target.ranks, strict=True)):
            assert not a[i, :, rank:].any() and not b[i, rank:].any(), "padding is zero in both factors"
            if rank:
                found[name] = a[i, :, :rank], b[i, :rank]
                assert spec.scale_of(name) == 1
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    import transformers

    directory = tmp_path_factory.mktemp("base")
    save_pretrained(directory, MODEL, PARAMS)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def in_peft(base, parts, directory):
    """A PEFT model that holds ``parts`` as adapters a0, a1, ..."""
    import peft

    for i, (adapters, spec) in enumerate(parts):
        save_peft(directory / f"a{i}", adapters, spec)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory / "a0", adapter_name="a0")
    for i in range(1, len(parts)):
        model.load_adapter(directory / f"a{i}", adapter_name=f"a{i}")
    return model.base_model


def peft_layers(model):
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.model.named_modules() if isinstance(m, LoraLayer)}


def peft_combined(model, count, weights, method, **options):
    names = {"rank": "svd_rank", "clamp": "svd_clamp", "sign": "majority_sign_method"}
    given = {names.get(k, k): v for k, v in options.items() if k != "key"}
    model.add_weighted_adapter([f"a{i}" for i in range(count)], list(weights), method, method, **given)
    layers = {name: layer for name, layer in peft_layers(model).items() if method in layer.lora_A}
    return {n: (x.lora_A[method].weight.numpy().T, x.lora_B[method].weight.numpy().T) for n, x in layers.items()}


def fixed_masks(monkeypatch, model, count, method, key):
    """Let PEFT draw our masks: for each module, by factor and adapter, made of key, name, number and factor alone."""
    import torch

    def masks():
        for name, layer in peft_layers(model).items():
            mark = jax.random.fold_in(key, zlib.crc32(name.encode()))
            for factor in (2,) if method.endswith("svd") else (0, 1):
                for i in range(count):
                    if f"a{i}" in layer.lora_A:
                        rank = layer.lora_A[f"a{i}"].weight.shape[0]
                        n = (layer.in_features, layer.out_features)
                        shape = n if factor == 2 else (rank, n[factor])
                        mask = jax.random.bernoulli(
                            jax.random.fold_in(jax.random.fold_in(mark, i), factor), EXTRA["density"], shape
                        )
                        yield torch.tensor(np.asarray(mask if factor == 0 else mask.T), dtype=torch.float32)

    drawn = masks()
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(drawn).reshape(probabilities.shape))
    return drawn


def assert_close(ours, theirs, method="", product=False):
    assert ours.keys() == theirs.keys()
    for name in ours:
        pairs = [(ours[name], theirs[name])] if not product else [([np.matmul(*x[name])] for x in (ours, theirs))]
        for x, y in zip(*pairs[0], strict=True):
            assert x.shape == y.shape and np.abs(x - y).max() <= 1e-5, f"{method} of {name}"


def compare(base, name, methods, directory, monkeypatch, **more):
    """Ours and PEFT's, by method."""
    specs, weights = INPUTS[name]
    parts = made(specs)
    model = in_peft(base, parts, directory)
    for method in methods:
        given = {**arguments(method, len(parts)), **more}
        drawn = fixed_masks(monkeypatch, model, len(parts), method, EXTRA["key"])
        theirs = peft_combined(model, len(parts), weights, method, **given)
        assert "dare" not in method or len(parts) == 1 or next(drawn, None) is None, "PEFT has drawn every mask"
        ours = by_name(*combine(parts, weights, method, **given))
        assert max(np.abs(a @ b).max() for a, b in ours.values()) > 2e-2
        yield method, ours, theirs


@pytest.mark.parametrize("name", COMPARED)
def test_the_tensors_are_those_of_peft(base, name, tmp_path, monkeypatch):
    for method, ours, theirs in compare(base, name, COMPARED[name], tmp_path, monkeypatch):
        assert_close(ours, theirs, method, product="svd" in method)


def test_signs_elected_by_frequency(base, tmp_path, monkeypatch):
    for method, ours, theirs in compare(base, "three", ["ties", "ties_svd"], tmp_path, monkeypatch, sign="frequency"):
        assert_close(ours, theirs, method, product="svd" in method)
        total = by_name(*combine(made(INPUTS["three"][0]), INPUTS["three"][1], method, **arguments(method)))
        assert any(np.abs(a @ b - np.matmul(*total[n])).max() > 1e-3 for n, (a, b) in ours.items())


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 7}, {"clamp": 0.9}, {"rank": 3, "clamp": 0.8}], ids=str)
def test_rank_and_clamp(base, options, tmp_path, monkeypatch):
    import torch

    plain = torch.linalg.svd

    def our_signs(matrix, **kwargs):
        u, s, vh = plain(matrix, **kwargs)
        n = s.shape[0]
        sign = torch.sign(vh[torch.arange(n), vh[:n].abs().argmax(1)])
        return torch.cat([u[:, :n] * sign, u[:, n:]], 1), s, torch.cat([vh[:n] * sign[:, None], vh[n:]])

    monkeypatch.setattr(torch.linalg, "svd", our_signs)
    for method, ours, theirs in compare(base, "alike", ["svd", "ties_svd"], tmp_path, monkeypatch, **options):
        assert_close(ours, theirs, method, product=False)
        assert {a.shape[1] for a, _ in ours.values()} == {options.get("rank", 4)}


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "cat") for name in SUMS), ("layers", "svd"), ("rank_patterns", "svd"), ("kinds", "svd")],
)
def test_merging_gives_the_weighted_sum(name, method):
    specs, weights = SUMS[name]
    parts = made(specs)
    adapters, spec = combine(parts, weights, method, **({"rank": 12} if method == "svd" else {}))
    difference = jax.tree.map(
        lambda base, *merged: base + sum(w * (m - base) for w, m in zip(weights, merged, strict=True)),
        PARAMS,
        *(merge(PARAMS, adapters, spec) for adapters, spec in parts),
    )
    for got, wanted in zip(jax.tree.leaves(merge(PARAMS, adapters, spec)), jax.tree.leaves(difference), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    selected = {name for a, s in parts for name in by_module(a, s)}
    assert set(by_name(adapters, spec)) == selected


def by_module(adapters, spec):
    return [
        n for s in adapter_target_modules(adapters, spec).values() for n, r in zip(s.names, s.ranks, strict=True) if r
    ]


@pytest.mark.parametrize("model", ["scan_layers", "conv_einsum", "experts"])
def test_any_linen_model(model):
    module, shape, spec = FOREIGN[model]
    params = random_params(module, jnp.zeros(shape))
    parts = made([spec, spec], params)
    adapters, combined = combine(parts, [0.5, -2], "cat")
    halves = [merge(params, *part) for part in parts]
    expected = jax.tree.map(lambda w, x, y: w + 0.5 * (x - w) - 2 * (y - w), params, *halves)
    for got, wanted in zip(jax.tree.leaves(merge(params, adapters, combined)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_modules_at_the_root_whose_names_end_others(method):
    """``fc`` is the ending of ``block.fc``, which has another rank and is not adapted by the second."""
    w = jnp.ones((6, 6))
    params = {"fc": {"kernel": w}, "block": {"fc": {"kernel": w}}, "other": {"fc": {"kernel": w}}}
    first = LoraSpec(rank=2, target_modules=r"fc|block\.fc", rank_pattern={"block.fc": 4})
    second = LoraSpec(rank=2, target_modules="fc", exclude_modules=["block.fc", "other.fc"])
    adapters, spec = combine(made([first, second], params), [1, 1], method, **arguments(method))
    assert set(by_name(adapters, spec)) == {"fc", "block.fc"}
    merge(params, adapters, spec)


def test_double_precision(x64):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    spec = LoraSpec(rank=2)
    parts = [
        (trained(init_adapters(jax.random.key(0), params, spec, dtype=jnp.float64), spec, s), spec) for s in (0, 1)
    ]
    adapters, combined = combine(parts, [0.5, -2], "svd", rank=4)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {np.dtype(np.float64)}
    got, (x, y) = by_name(adapters, combined), (by_part(*part) for part in parts)
    for name, (a, b) in got.items():
        np.testing.assert_allclose(a @ b, 0.5 * x[name] - 2 * y[name], atol=1e-13)


def by_part(adapters, spec):
    """The change of each module's kernel."""
    pair = {
        name: tree.get_in(adapters, path)
        for path, s in adapter_target_modules(adapters, spec).items()
        for name in [path]
    }
    found = {}
    for path, p in pair.items():
        for i, name in enumerate(module_names(path, p["lora_a"].shape[:-2], spec.stacked)):
            found[name] = spec.scale_of(name) * np.asarray(p["lora_a"][i] @ p["lora_b"][i])
    return found


def test_the_key_decides_the_masks():
    parts = made(INPUTS["alike"][0])
    draws = [combine(parts, [1, 1], "dare_linear", density=0.5, key=jax.random.key(i))[0] for i in (0, 0, 1)]
    leaves = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(draw)]) for draw in draws]
    assert (leaves[0] == leaves[1]).all() and (leaves[0] == 0).any() and (leaves[0] != leaves[2]).any()


def test_a_combination_can_be_combined_and_saved(tmp_path):
    from stablelora_jax import load_peft

    parts = made(INPUTS["rank_patterns"][0])
    combined = combine(parts, [1, 1], "cat")
    again = combine([combined, parts[0]], [1, -1], "cat")
    save_peft(tmp_path, *again)
    loaded, _ = load_peft(tmp_path, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, loaded, again[0])
    second = merge(PARAMS, *parts[1])
    for got, wanted in zip(jax.tree.leaves(merge(PARAMS, *again)), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_one_adapter_is_scaled_by_any_method():
    parts = made(INPUTS["one"][0])
    expected = by_name(*combine(parts, [2.0], "linear"))
    for method in METHODS:
        assert_close(by_name(*combine(parts, [2.0], method)), expected, method)


def alike(**changes):
    return {"adapters": made(INPUTS["alike"][0]), "weights": [1, 1], "method": "linear", **changes}


def with_leaf(name):
    (adapters, spec), other = made(INPUTS["alike"][0])
    path = ("model", "layers", "self_attn", "q_proj")
    return [(tree.set_in(adapters, (*path, name), jnp.ones(3)), spec), other]


def other_model():
    _, params = tiny_decoder(hidden_size=32)
    return [*made([LoraSpec(**PAIR)]), *made([LoraSpec(**PAIR)], params)]


BAD = {
    "method": (lambda: alike(method="mean"), "method must be one of linear, ties, .*, not 'mean'"),
    "none": (lambda: alike(adapters=[], weights=[]), "there are no adapters"),
    "weights": (lambda: alike(weights=[1]), "there are 2 adapters and 1 weights"),
    "nan": (lambda: alike(weights=[1, float("nan")]), "weights must be finite, not nan"),
    "no_density": (lambda: alike(method="ties"), "ties needs density"),
    "density_0": (lambda: alike(method="ties", density=0), r"density must be in \(0, 1\], not 0"),
    "density_2": (lambda: alike(method="dare_ties_svd", density=2), r"density must be in \(0, 1\], not 2"),
    "no_key": (lambda: alike(method="dare_linear", density=0.5), "dare_linear draws random masks: give it a key"),
    "sign": (lambda: alike(method="ties", density=0.5, sign="most"), "sign must be total or frequency, not 'most'"),
    "rank_0": (lambda: alike(method="svd", rank=0), "rank must be a whole number of at least 1, not 0"),
    "clamp": (lambda: alike(method="svd", clamp=1.5), r"clamp is a quantile, in \(0, 1\], not 1.5"),
    "unused_density": (lambda: alike(method="cat", density=0.5), "density is of no use to cat: leave it out"),
    "unused_key": (lambda: alike(method="cat", key=EXTRA["key"]), "key is of no use to cat"),
    "unused_rank": (lambda: alike(rank=3), "rank is of no use to linear"),
    "unused_clamp": (lambda: alike(clamp=0.5), "clamp is of no use to linear"),
    "rank_of_one": (
        lambda: alike(adapters=made(INPUTS["one"][0]), weights=[1], method="svd", rank=2),
        "rank is of no use to svd of one adapter",
    ),
    "ranks": (
        lambda: alike(adapters=made(INPUTS["ranks"][0])),
        "model.layers.0.self_attn.q_proj has rank 2 in adapter 0, 3 in adapter 1: only cat, svd",
    ),
    "layer_ranks": (
        lambda: alike(adapters=made([LoraSpec(**PAIR), LoraSpec(**PAIR, rank_pattern=PATTERN)])),
        "model.layers.1.self_attn.o_proj has rank 4 in adapter 0, 2 in adapter 1",
    ),
    "magnitude": (lambda: alike(adapters=with_leaf("lora_magnitude_vector")), "adapter 0 trains .*magnitude_vector"),
    "full": (lambda: alike(adapters=with_leaf("full")), "q_proj.full and cannot .* merge it into the base"),
    "spec": (
        lambda: alike(
            adapters=[(made(INPUTS["alike"][0])[0][0], LoraSpec(**{**PAIR, "rank": 9})), *made(INPUTS["one"][0])]
        ),
        "adapter 0: model.layers.self_attn.o_proj: adapters have rank 4, the spec says 9",
    ),
    "shapes": (
        lambda: alike(adapters=other_model()),
        r"model.layers.self_attn.o_proj: adapter 1 is made for \(3, 16, 32\), adapter 0 for",
    ),
    "stacked": (
        lambda: alike(
            adapters=[*made(INPUTS["one"][0]), (made(INPUTS["one"][0])[0][0], LoraSpec(**PAIR, stacked=STACKED))]
        ),
        "adapter 1 has stacked .'layers', 'blocks'., adapter 0",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_are_named(fault):
    make, message = BAD[fault]
    with pytest.raises(InputError, match=message) as error:
        combine(**make())
    assert "\n" not in str(error.value)


def test_other_parametrizations_are_refused():
    spec = LoraSpec(**PAIR)
    dora = LoraSpec(**PAIR, parametrization="dora")
    with pytest.raises(InputError, match="adapter 1 is dora and cannot be taken together with others: only plain LoRA"):
        combine([*made([spec]), (made([spec])[0][0], dora)], [1, 1], "cat")


def test_axes_that_differ_are_refused():
    spec = LoraSpec(**PAIR, in_axes={"q_proj": (0,)})
    other = LoraSpec(**PAIR, in_axes={"q_proj": (1,)})
    adapters = made([LoraSpec(**PAIR)])[0][0]
    with pytest.raises(InputError, match="in_axes of 'q_proj' differ"):
        combine([(adapters, spec), (adapters, other)], [1, 1], "cat")
