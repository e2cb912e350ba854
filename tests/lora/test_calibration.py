"""What initialisations from data measure, against gradients of pairs, NumPy's decompositions and PEFT's PCA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, calibrate, init_adapters, quantization_residual, summed_loss
from stablelora_jax.data import Example, make_batch
from stablelora_jax.quantization import dequantize_tree, quantize_params
from stablelora_jax.utils import tree
from tests.helpers import FOREIGN, jit, random_params, tiny_decoder

TARGETS = ("q_proj", "down_proj")


def batches(count=2):
    rng = np.random.default_rng(0)
    draw = lambda n: Example(tuple(map(int, rng.integers(0, 31, n))), 2)
    return [make_batch([draw(9), draw(5)]) for _ in range(count)]


def mean_loss(lora, variables, batch):
    return summed_loss(lora, variables, batch) / batch.loss_mask.sum()


def loss_mask(batch):
    return batch.loss_mask


def by_pairs(lora, params, batches, loss):
    """A and ``A^T G`` of each module, the gradient of B at B = 0 with s = 1, averaged over ``batches``."""
    spec = LoraSpec(**{**lora.spec.to_dict(), "init": "kaiming", "scaling": "none", "rank_pattern": {}})
    own = adapted(lora.model, spec)
    pairs = init_adapters(jax.random.key(0), params, spec)
    grad = jit(jax.grad(lambda pairs, batch: loss(own, {"params": params, "lora": pairs}, batch)))
    return pairs, jax.tree.map(lambda *leaves: sum(leaves) / len(batches), *(grad(pairs, one) for one in batches))


def require_gradients(found, pairs, grads):
    """``found`` are gradients G of which pairs have seen ``A^T G``."""
    measured = tree.leaves_by_path(found)
    assert measured
    for path, gradient in measured.items():
        a, db = tree.get_in(pairs, path[:-1])["lora_a"], tree.get_in(grads, path[:-1])["lora_b"]
        np.testing.assert_allclose(np.swapaxes(a, -1, -2) @ np.asarray(gradient), db, atol=1e-5)


def test_gradients_of_kernels_are_those_that_pairs_see():
    """Averaged over the batches; of stacks, and measured one after another."""
    model, params = tiny_decoder()
    lora = adapted(model, LoraSpec(rank=4, init="lora_ga", target_modules=TARGETS))
    found = calibrate(lora, params, batches(), mean_loss, one_at_a_time=True)
    assert len(tree.leaves_by_path(found)) == 2
    require_gradients(found, *by_pairs(lora, params, batches(), mean_loss))


@pytest.mark.parametrize("name", ["dense", "conv_einsum", "scan_layers"])
def test_gradients_in_models_that_are_not_ours(name):
    model, shape, spec = FOREIGN[name]
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    params, loss = random_params(model, x), lambda lora, variables, x: jnp.sin(lora.apply(variables, x)).sum()
    lora = adapted(model, LoraSpec(**{**spec.to_dict(), "rank_pattern": {}, "init": "lora_ga"}))
    found = calibrate(lora, params, [x], loss, x)
    require_gradients(found, *by_pairs(lora, params, [x], loss))


def function(params, x):
    """A model without modules: a scan over layers, and a leaf whose inputs come second."""

    def layer(x, own):
        return jnp.tanh(x @ own["fc"]), None

    x = jax.lax.scan(layer, x, params["layers"])[0]
    return jnp.einsum("btd,ed->bte", x, params["last"])


@pytest.mark.parametrize("init", ["lora_ga", "eva"])
def test_a_function_is_calibrated_by_its_computation(init):
    rng = np.random.default_rng(4)
    params = {"layers": {"fc": rng.normal(size=(3, 6, 6))}, "last": rng.normal(size=(5, 6))}
    params, x = jax.tree.map(jnp.float32, (params, rng.normal(size=(2, 7, 6))))
    lora = adapted(function, LoraSpec(rank=2, init=init, target_modules=["fc", "last"]))
    found = calibrate(lora, params, [x], lambda lora, v, x: jnp.sin(lora.apply(v, x)).sum(), x)
    adapters = lora.init(jax.random.key(0), params, x, calibration=found)
    assert adapters["last"]["lora_a"].shape == (6, 2) and adapters["layers"]["fc"]["lora_a"].shape == (3, 6, 2)
    if init == "lora_ga":
        grads = jax.grad(lambda params: jnp.sin(function(params, x)).sum())(params)
        np.testing.assert_allclose(found["layers"]["fc"]["gradient"], grads["layers"]["fc"], atol=1e-5)
        np.testing.assert_allclose(found["last"]["gradient"], grads["last"].T, atol=1e-5)
        return
    inputs = [np.asarray(x, np.float64).reshape(-1, 6)]
    for w in np.asarray(params["layers"]["fc"], np.float64):
        inputs.append(np.tanh(inputs[-1] @ w))
    for number, own in enumerate(inputs[:-1]):
        require_axes(adapters["layers"]["fc"]["lora_a"][number], own)
    require_axes(adapters["last"]["lora_a"], inputs[-1])


def require_axes(a, inputs):
    """``a`` (in, r) are the principal axes of the rows of ``inputs``, up to signs."""
    vt = np.linalg.svd(inputs - inputs.mean(axis=0), full_matrices=False)[2]
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(a) * vt[: a.shape[1]].T, axis=0)), 1, atol=1e-4)


def test_principal_axes_are_those_of_the_loss_tokens_inputs_and_pefts():
    """Over batches, without pads and prompts; with the shares of the variance that PEFT's incremental PCA gives."""
    model, params = tiny_decoder()
    spec = LoraSpec(rank=4, init="eva", target_modules=["q_proj"], layers_to_transform=[0])
    found = calibrate(adapted(model, spec), params, batches(), mean_loss, token_mask=loss_mask)
    own = found["model"]["layers"]["self_attn"]["q_proj"]
    weight, embedding = params["model"]["layers"]["input_layernorm"]["scale"][0], params["model"]["embed_tokens"]
    parts = []
    for batch in batches():
        x = np.asarray(embedding["embedding"], np.float64)[batch.tokens[batch.loss_mask > 0]]
        size = np.sqrt(np.square(x).mean(axis=1, keepdims=True) + model.config.rms_norm_eps)
        parts.append(x / size * np.asarray(weight))
    whole = np.concatenate(parts)
    adapters = init_adapters(jax.random.key(0), params, spec, calibration=found)
    a = adapters["model"]["layers"]["self_attn"]["q_proj"]["lora_a"]
    require_axes(a[0], whole)
    assert not a[1:].any()
    torch, pca = pytest.importorskip("torch"), pytest.importorskip("peft.utils.incremental_pca")
    theirs = pca.IncrementalPCA(n_components=6, lowrank=False)
    for part in parts:
        theirs.partial_fit(torch.tensor(part))
    overlap = np.abs(np.sum(theirs.components_.numpy()[:4].T * np.asarray(a[0]), axis=0))
    np.testing.assert_allclose(overlap[:2], 1, atol=1e-3)
    shares = np.square(np.linalg.norm(own["inputs"][0], axis=0)) / own["variance"][0]
    np.testing.assert_allclose(shares[:3], theirs.explained_variance_ratio_.numpy()[:3], atol=1e-2)


def test_the_first_step_of_lora_sb_has_the_sign_of_the_gradient():
    model, params = tiny_decoder()
    spec = LoraSpec(rank=4, target_modules=TARGETS)
    lora = {
        init: adapted(model, LoraSpec(**{**spec.to_dict(), "init": init, "parametrization": kind}))
        for init, kind in (("lora_ga", "lora"), ("lora_sb", "lora_xs"))
    }
    own = calibrate(lora["lora_ga"], params, batches(), mean_loss)
    found = calibrate(lora["lora_sb"], params, batches(), mean_loss, learning_rate=0.25)
    for path, gradient in tree.leaves_by_path(own).items():
        update = tree.get_in(found, path[:-1])["update"]
        np.testing.assert_array_equal(update, -0.25 * np.sign(gradient))


@pytest.mark.parametrize("init", ["lora_ga", "eva", "loftq"])
def test_a_quantised_base(init):
    """Gradients and inputs are those of what it stands for; the residual is what it lacks."""
    model, params = tiny_decoder()
    quantised = quantize_params(params, "nf4")
    spec = LoraSpec(rank=4, init=init, target_modules=TARGETS)
    lora = adapted(model, spec)
    if init == "loftq":
        found = quantization_residual(params, quantised, spec)
        wanted = jax.tree.map(jnp.subtract, params, dequantize_tree(quantised))
        for path, residual in tree.leaves_by_path(found).items():
            assert np.abs(residual).max() > 1e-3
            np.testing.assert_allclose(residual, tree.get_in(wanted, (*path[:-1], "kernel")), atol=1e-6)
        return
    found, wanted = (calibrate(lora, base, batches(1), mean_loss) for base in (quantised, dequantize_tree(quantised)))
    for path, own in tree.leaves_by_path(found).items():
        if path[-1] != "inputs":  # whose signs, and axes of equal variance, are free
            np.testing.assert_allclose(own, tree.get_in(wanted, path), rtol=1e-4, atol=1e-5)


def spec_of(init, parametrization="lora"):
    return LoraSpec(rank=2, init=init, parametrization=parametrization, target_modules=["q_proj"])


@pytest.mark.parametrize(
    "spec,given,why",
    [
        (spec_of("kaiming"), {}, "init='kaiming' starts from no data"),
        (spec_of("loftq"), {}, "starts from no batches: call quantization_residual"),
        (spec_of("lora_sb", "lora_xs"), {}, "give calibrate the learning_rate"),
        (spec_of("eva"), {"batches": []}, "at least one batch"),
        (spec_of("lora_ga"), {"loss": lambda *_: jnp.nan * _[1]["params"]["q_proj"]["kernel"].sum()}, "not finite"),
        (spec_of("eva"), {"loss": lambda *_: jnp.zeros(())}, "no input of it was seen"),
    ],
)
def test_what_cannot_be_measured_is_refused(spec, given, why):
    params = {"q_proj": {"kernel": jnp.ones((6, 6))}}
    arguments = {"batches": [jnp.ones((2, 6))], "loss": lambda *_: jnp.zeros(()), **given}
    with pytest.raises(InputError, match=why):
        calibrate(adapted(lambda params, x: x, spec), params, **arguments)


def test_a_residual_needs_a_quantised_kernel_and_the_one_before():
    _, params = tiny_decoder()
    quantised, spec = quantize_params(params, "nf4"), LoraSpec(init="loftq", target_modules=["q_proj"])
    with pytest.raises(InputError, match="q_proj is not quantised"):
        quantization_residual(params, params, spec)
    with pytest.raises(InputError, match="q_proj: full must hold the kernel"):
        quantization_residual(quantised, quantised, spec)
