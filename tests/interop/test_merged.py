"""A merged model reloads, in transformers and here, as base and adapters together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, generate, init_adapters, load_pretrained, untie
from stablelora_jax.interop.merged import save_merged
from tests.helpers import tiny_decoder, tokens, trained

SPECS = {
    "lora": LoraSpec(target_modules="all-linear", rank=3),
    "tied": LoraSpec(target_modules="all-linear", rank=3, scaling="rslora"),
    "tied_embedding": LoraSpec(target_modules=["embed_tokens", "q_proj"], rank=2),
    "head_and_embedding": LoraSpec(target_modules=["embed_tokens", "lm_head"], rank=2),
    "dora_saved_bias": LoraSpec(
        parametrization="dora", rank=2, modules_to_save=["lm_head", "norm", "layers.1.mlp"], bias="all"
    ),
}


def case(name, dtype=jnp.float32):
    model, params = tiny_decoder(dtype, tie_word_embeddings=name.startswith("tied"), qkv_bias=True, o_bias=True)
    spec = SPECS[name]
    return model, params, trained(init_adapters(jax.random.key(0), params, spec), spec), spec


@pytest.mark.parametrize("name", SPECS)
def test_transformers_gives_the_same_logits(name, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model, params, adapters, spec = case(name)
    check = save_merged(tmp_path, model, params, adapters, spec)
    assert check.difference < 1e-4 * max(1, check.largest)
    expected = np.asarray(adapted(model, spec).apply({"params": params, "lora": adapters}, tokens()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.tensor(np.asarray(tokens()))).logits.numpy()
    assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    assert np.abs(found - model.apply({"params": params}, tokens())).max() > 1e-2
    again, _ = load_pretrained(tmp_path)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(tmp_path):
    model, params, adapters, spec = case("lora", jnp.bfloat16)
    rounded, exact = (
        save_merged(tmp_path / name, model, params, adapters, spec, dtype=dtype)
        for name, dtype in (("narrow", None), ("wide", "float32"))
    )
    _, narrow = load_pretrained(tmp_path / "narrow", dtype=jnp.bfloat16)
    _, wide = load_pretrained(tmp_path / "wide")
    for x, y in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert np.array_equal(x, y.astype(jnp.bfloat16))
    assert rounded.difference < 0.1 * rounded.largest and exact.difference < 0.1 * exact.largest


def test_a_kernel_that_is_not_finite_is_refused(tmp_path):
    model, params, adapters, spec = case("lora")
    adapters["model"]["layers"]["mlp"]["up_proj"]["lora_b"] *= jnp.inf
    with pytest.raises(InputError, match="up_proj gives NaN"):
        save_merged(tmp_path / "out", model, params, adapters, spec)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
def test_fifty_greedy_tokens_of_a_real_model(tied, shared, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model, params = load_pretrained(shared("models/stories260K"))
    if not tied:
        model, params = untie(model, params)
    spec = LoraSpec(target_modules=["q_proj", "down_proj", "embed_tokens"], rank=4, parametrization="dora")
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec, size=0.15)
    save_merged(tmp_path, model, params, adapters, spec)
    settings = dict(max_new_tokens=50)
    prompts = ["Once upon a time", "Lily and Tom went"]
    base = generate(model, {"params": params}, prompts, **settings)
    unmerged = generate(adapted(model, spec), {"params": params, "lora": adapters}, prompts, **settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.config.tie_word_embeddings == tied
    for plain, ours in zip(base, unmerged, strict=True):
        ids = torch.tensor([ours.prompt])
        out = theirs.generate(ids, max_new_tokens=50, do_sample=False)[0, len(ours.prompt) :]
        assert tuple(out.tolist()) == ours.tokens
        assert ours.tokens != plain.tokens
