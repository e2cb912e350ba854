"""PEFT's directory format: both ways against PEFT itself, and every fault of a directory named."""

import copy
import functools
import json
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, load_peft, save_peft, save_pretrained
from stablelora_jax.interop.peft import load_metadata
from stablelora_jax.lora.target_modules import find_target_modules
from tests.helpers import jit, tiny_decoder, tokens, trained

SPECS = {
    "default": LoraSpec(),
    "rslora": LoraSpec(scaling="rslora", rank=4, alpha=11.5, target_modules=["o_proj", "down_proj"]),
    "all_linear": LoraSpec(target_modules="all-linear", rank=2, dropout=0.1),
    "regex": LoraSpec(target_modules=r".*\.(q|up)_proj", rank=3),
    "patterns": LoraSpec(
        target_modules="all-linear",
        rank=4,
        rank_pattern={"layers.1.self_attn.q_proj": 1, "q_proj": 2, "down_proj": 3},
        alpha_pattern={"layers.[02].*v_proj": 3, "up_proj": 7.5},
        scaling="rslora",
    ),
    "exclude": LoraSpec(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.self_attn.q_proj"], rank=2),
    "exclude_regex": LoraSpec(target_modules="all-linear", exclude_modules=r".*(mlp|\.2\.).*", rank=2),
    "layers": LoraSpec(target_modules=["k_proj", "gate_proj"], layers_to_transform=(0, 2), rank=2),
    "layers_regex": LoraSpec(target_modules=r".*proj", layers_to_transform=(1,), rank=2),
    "regex_of_containers": LoraSpec(target_modules=r"model\.layers\.[01].*", rank=2),
    "head": LoraSpec(target_modules=["q_proj", "lm_head"], rank=2),
    "embedding": LoraSpec(target_modules=["embed_tokens", "o_proj"], rank=2, alpha=3),
    "tied_embedding": LoraSpec(target_modules=["embed_tokens", "o_proj"], rank=2, alpha=3, scaling="rslora"),
    "dora": LoraSpec(
        parametrization="dora", target_modules="all-linear", rank=3, rank_pattern={"layers.1.mlp.up_proj": 1}
    ),
    "dora_some_layers": LoraSpec(
        parametrization="dora", scaling="rslora", target_modules=["q_proj"], layers_to_transform=(0, 2)
    ),
    "dora_embedding": LoraSpec(parametrization="dora", target_modules=["embed_tokens", "q_proj", "lm_head"], rank=2),
    "saved": LoraSpec(rank=2, modules_to_save=["lm_head", "embed_tokens", "norm", "mlp"]),
    "saved_some_layers": LoraSpec(rank=2, modules_to_save=["layers.1.input_layernorm", "layers.0.self_attn"]),
    "saved_target": LoraSpec(rank=2, target_modules="all-linear", modules_to_save=["k_proj", "layers.2.mlp.up_proj"]),
    "tied_saved": LoraSpec(rank=2, modules_to_save=["embed_tokens"]),
    "bias_all": LoraSpec(rank=2, bias="all"),
    "bias_lora_only": LoraSpec(
        rank=2, bias="lora_only", target_modules=["q_proj", "down_proj"], layers_to_transform=(1, 2)
    ),
    "lora_bias": LoraSpec(
        rank=2, lora_bias=True, target_modules=["q_proj", "up_proj"], layers_to_transform=(0, 2), alpha=3
    ),
    "everything": LoraSpec(
        rank=3,
        parametrization="dora",
        scaling="rslora",
        target_modules=["q_proj", "up_proj", "embed_tokens"],
        rank_pattern={"layers.1.*up_proj": 2},
        alpha_pattern={"q_proj": 5},
        modules_to_save=["lm_head", "input_layernorm"],
        bias="lora_only",
    ),
}
EMBEDDED = ("head", "embedding", "dora_embedding", "everything")  # PEFT adds the base's own weights to such a file


CHOICES = (  # compared by values: their gradients are those of default, all_linear, dora and everything
    "exclude",
    "exclude_regex",
    "layers",
    "layers_regex",
    "patterns",
    "regex",
    "regex_of_containers",
    "rslora",
)


def case(name):
    model, params = tiny_decoder(qkv_bias=True, o_bias=True, tie_word_embeddings=name.startswith("tied"))
    spec = SPECS[name]
    return model, params, spec, trained(init_adapters(jax.random.key(0), params, spec), spec)


def logits(model, params, spec, adapters):
    return adapted(model, spec).apply({"params": params, "lora": adapters}, tokens())


def chosen(spec, params):
    return [
        n
        for target in find_target_modules(params, spec).values()
        for n, r in zip(target.names, target.ranks, strict=True)
        if r
    ]


@pytest.mark.parametrize("name", SPECS)
def test_round_trip(name, tmp_path):
    _, params, spec, adapters = case(name)
    save_peft(tmp_path, adapters, spec, params=params)
    loaded, read = load_peft(tmp_path, params)
    chex.assert_trees_all_equal(loaded, adapters)
    if isinstance(spec.target_modules, tuple) and name != "saved":
        assert read == spec
    assert {n: (read.rank_of(n), read.scale_of(n)) for n in chosen(read, params)} == {
        n: (spec.rank_of(n), spec.scale_of(n)) for n in chosen(spec, params)
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """``tied -> (directory, model of transformers, its logits)``, each loaded once."""

    @functools.cache
    def load(tied):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        model, params = tiny_decoder(qkv_bias=True, o_bias=True, tie_word_embeddings=tied)
        directory = tmp_path_factory.mktemp("peft") / "base"
        save_pretrained(directory, model, params)
        base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            return directory, base, base(torch.tensor(np.asarray(tokens()))).logits.numpy()

    return load


@pytest.mark.parametrize("name", SPECS)
def test_peft_gives_the_same_logits_and_gradients(name, bases, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    model, params, spec, adapters = case(name)
    directory, loaded_base, plain = bases(name.startswith("tied"))
    save_peft(tmp_path / "adapter", adapters, spec, base_model=str(directory), params=params)
    base = copy.deepcopy(loaded_base)
    inputs = torch.tensor(np.asarray(tokens()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    said = {str(w.message)[:40] for w in caught if "gradient_checkpointing" not in str(w.message)}
    expected = theirs(inputs).logits
    ours, gradient = values(name, model, params, spec, adapters)
    if gradient is not None:
        torch.square(expected).mean().backward()
        compare_gradients(theirs, gradient, name, spec, params, tmp_path)
    expected = expected.detach().numpy()
    scale = np.abs(expected).max()
    assert np.abs(ours - expected).max() < 1e-4 * max(1, scale)
    assert np.abs(expected - plain).max() > 1e-2 * scale
    theirs.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings(record=True) as caught:  # PEFT's own directory gives the warnings that ours may give
        warnings.simplefilter("always")
        if said:
            peft.PeftModel.from_pretrained(copy.deepcopy(loaded_base), tmp_path / "again")
    assert said <= {str(w.message)[:40] for w in caught}
    loaded, read = load_peft(tmp_path / "again", params)
    chex.assert_trees_all_equal(loaded, adapters)
    save_peft(tmp_path / "back", loaded, read, params=params)
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("again", "back"))
    assert first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def values(name, model, params, spec, adapters):
    """Our logits, and the gradient of their mean square where it is compared."""
    if name in CHOICES:
        return jit(lambda a: logits(model, params, spec, a))(adapters), None
    cost = lambda a: (jnp.square(y := logits(model, params, spec, a)).mean(), y)
    gradient, ours = jit(jax.grad(cost, has_aux=True))(adapters)
    return ours, gradient


def compare_gradients(theirs, gradient, name, spec, params, tmp_path):
    """Of every parameter that PEFT trains, where the head is not the embedding, too."""
    save_peft(tmp_path / "gradient", gradient, spec, params=params)
    flat = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    found = 0
    for key, parameter in theirs.named_parameters():
        own = key.replace(".default", "").replace(".modules_to_save", "").replace(".original_module", "")
        own = own.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        if parameter.grad is not None and own in flat and not name.startswith("tied"):
            found += 1
            theirs_grad = parameter.grad.numpy()
            assert np.abs(flat[own] - theirs_grad).max() < 1e-4 * max(1, np.abs(theirs_grad).max()), key
    assert found == len([key for key in flat if "base_layer.weight" not in key]) or name.startswith("tied")


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_made_by_peft(rslora, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    model, params = tiny_decoder()
    save_pretrained(tmp_path / "base", model, params)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=9,
        use_rslora=rslora,
        target_modules=["q_proj", "k_proj", "up_proj", "w1"],
        rank_pattern={"layers.1.*q_proj": 2, "k_proj": 3, "q_proj": 5},
        alpha_pattern={"up_proj": 3},
        exclude_modules=["layers.2.mlp.up_proj"],
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
        expected = theirs(torch.tensor(np.asarray(tokens()))).logits.numpy()
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="target_modules 'w1' match no module"):
        adapters, spec = load_peft(tmp_path / "adapter", params)
    ours = logits(model, params, spec, adapters)
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_keys_and_layout(tmp_path):
    _, params, spec, adapters = case("patterns")
    save_peft(tmp_path, adapters, spec, base_model="org/name")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    a = adapters["model"]["layers"]["self_attn"]["q_proj"]["lora_a"]
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    assert np.array_equal(tensors[key.format(1, "A")], a[1, :, :1].T) and tensors[key.format(0, "B")].shape == (16, 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name" and config["use_rslora"] is True
    assert list(config["rank_pattern"]) == ["layers.1.self_attn.q_proj", "q_proj", "down_proj"], "order is meaning"
    assert config["peft_type"] == "LORA" and isinstance(config["target_modules"], list)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_base_is_untied_first(target, tmp_path):
    """PEFT adapts one of two tied modules alone; the shared matrix cannot say that, an untied copy can."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    from stablelora_jax.models.untie import untie

    model, params = tiny_decoder(tie_word_embeddings=True)
    save_pretrained(tmp_path / "base", model, params)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[target, "q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
        expected = theirs(torch.tensor(np.asarray(tokens()))).logits.numpy()
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="of this base are tied: untie them first"):
        load_peft(tmp_path / "adapter", params)
    apart, apart_params = untie(model, params)
    adapters, spec = load_peft(tmp_path / "adapter", apart_params)
    ours = logits(apart, apart_params, spec, adapters)
    assert np.abs(ours - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_what_needs_the_base_says_so(tmp_path):
    for name in ("embedding", "saved", "bias_all"):
        _, _, spec, adapters = case(name)
        with pytest.raises(InputError, match="pass params="):
            save_peft(tmp_path, adapters, spec)


def test_another_base_is_noticed(tmp_path):
    _, params, spec, adapters = case("embedding")
    save_peft(tmp_path, adapters, spec, params=params)
    params["model"]["embed_tokens"]["embedding"] += 1
    with pytest.raises(InputError, match="embed_tokens.base_layer.weight differs from the base"):
        load_peft(tmp_path, params)


def test_metadata_lies_beside(tmp_path):
    _, _, spec, adapters = case("default")
    save_peft(tmp_path, adapters, spec, metadata={"optimizer": {"name": "stable_lora", "shrink_ratio": 5e-4}})
    assert load_metadata(tmp_path)["optimizer"]["shrink_ratio"] == 5e-4
    assert "optimizer" not in json.loads((tmp_path / "adapter_config.json").read_text())


RULES = {  # what PEFT writes, and where its rules are not what they seem
    "whole_name_and_layers": (dict(target_modules=["q_proj", "lm_head"], layers_to_transform=[0]), {}),
    "whole_path_and_layers": (
        dict(target_modules=["q_proj", "model.layers.1.mlp.up_proj"], layers_to_transform=[0]),
        {},
    ),
    "no_bias_there": (dict(target_modules=["up_proj"], bias="lora_only"), {}),
    "bias_and_saved": (dict(target_modules=["down_proj"], modules_to_save=["q_proj"], bias="all"), {}),
    "all_embeddings": (dict(target_modules=["q_proj"]), dict(save_embedding_layers=True)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RULES)
def test_rules_of_peft(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    keys, saving = RULES[name]
    model, params = tiny_decoder(model_type="qwen2", qkv_bias=True)
    save_pretrained(tmp_path / "base", model, params)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **keys))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
        expected = theirs(torch.tensor(np.asarray(tokens()))).logits.numpy()
    theirs.save_pretrained(tmp_path / "adapter", **saving)
    adapters, spec = load_peft(tmp_path / "adapter", params)
    assert np.abs(logits(model, params, spec, adapters) - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    save_peft(tmp_path / "again", adapters, spec, params=params)
    again, _ = load_peft(tmp_path / "again", params)
    chex.assert_trees_all_equal(again, adapters)


def test_layers_hold_for_whole_names_too_when_peft_reads_ours(tmp_path):
    _, params = tiny_decoder()
    spec = LoraSpec(rank=2, target_modules=["q_proj", "lm_head"], layers_to_transform=(0,))
    save_peft(tmp_path, init_adapters(jax.random.key(0), params, spec), spec)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"] and config["layers_to_transform"] is None


def test_a_stack_trained_in_full_is_written_layer_by_layer(tmp_path):
    _, params = tiny_decoder()
    spec = LoraSpec(rank=2, target_modules=["lm_head"], modules_to_save=["layers"])
    save_peft(tmp_path, init_adapters(jax.random.key(0), params, spec), spec, params=params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [f"model.layers.{i}" for i in range(3)]


def test_base_weights_are_compared_at_the_lesser_precision(tmp_path):
    model, params = tiny_decoder(dtype=jnp.bfloat16)
    spec = SPECS["embedding"]
    save_peft(tmp_path, init_adapters(jax.random.key(0), params, spec), spec, params=params)
    finer = jax.tree.map(lambda x: x.astype(jnp.float32) * (1 + 1e-5), params)
    load_peft(tmp_path, finer)
    finer["model"]["embed_tokens"]["embedding"] *= 1.1
    with pytest.raises(InputError, match="differs from the base"):
        load_peft(tmp_path, finer)


def test_an_eva_adapter_is_read(tmp_path):
    _, params, spec, adapters = case("default")
    save_peft(tmp_path, adapters, spec)
    edit_config(tmp_path, init_lora_weights="eva", eva_config={"rho": 2.0})
    chex.assert_trees_all_equal(load_peft(tmp_path, params)[0], adapters)
    edit_config(tmp_path, init_lora_weights="lora_ga")
    with pytest.raises(InputError, match="lora_ga"):
        load_peft(tmp_path, params)


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "DROP"}))


def edit_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD = {
    "dora": (lambda d: edit_config(d, use_dora=True), "lacks .*lora_magnitude_vector"),
    "bias": (lambda d: edit_config(d, bias="lora_only"), "lacks .*base_layer.bias"),
    "bias_word": (lambda d: edit_config(d, bias="some"), "bias must be one of none, all, lora_only"),
    "lora_bias": (lambda d: edit_config(d, lora_bias=True), "lacks .*lora_B.bias"),
    "modules_to_save": (lambda d: edit_config(d, modules_to_save=["lm_head"]), "lacks lm_head.weight"),
    "modules_to_save_type": (lambda d: edit_config(d, modules_to_save=5), "modules_to_save must be names"),
    "tokens": (lambda d: edit_config(d, trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "flag": (lambda d: edit_config(d, use_dora="yes"), "use_dora must be true or false"),
    "pattern_type": (lambda d: edit_config(d, rank_pattern=[1]), "rank_pattern must map"),
    "target_type": (lambda d: edit_config(d, target_modules=[1]), "target_modules must be names"),
    "pissa": (lambda d: edit_config(d, init_lora_weights="pissa_niter_4"), "changed; PEFT's save_pretrained"),
    "fan_in_fan_out": (lambda d: edit_config(d, fan_in_fan_out=True), "fan_in_fan_out"),
    "other_type": (lambda d: edit_config(d, peft_type="OFT"), "peft_type = 'OFT'"),
    "no_type": (lambda d: edit_config(d, peft_type="DROP"), "the key peft_type is missing"),
    "no_rank": (lambda d: edit_config(d, r="DROP"), "the key r is missing"),
    "no_target": (lambda d: edit_config(d, target_modules="DROP"), "target_modules is missing"),
    "rank_a_text": (lambda d: edit_config(d, r="eight"), "rank must be"),
    "unknown": (lambda d: edit_config(d, feature_of_tomorrow={"a": 1}), "feature_of_tomorrow"),
    "no_config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
    "config_not_json": (lambda d: (d / "adapter_config.json").write_text("{"), "not readable JSON"),
    "config_a_list": (lambda d: (d / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
    "no_weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors does not exist"),
    "cut": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"abc"), "not a readable safetensors file"),
    "missing": (
        lambda d: edit_tensors(d, lambda t: t.pop(Q) is None or None),
        "lacks model.layers.0.self_attn.q_proj.lora_A",
    ),
    "extra": (lambda d: edit_tensors(d, lambda t: {**t, Q.replace("q_proj", "k_proj"): t[Q]}), "holds .*k_proj.lora_A"),
    "prefix": (
        lambda d: edit_tensors(d, lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}),
        "is not base_model",
    ),
    "transposed": (
        lambda d: edit_tensors(d, lambda t: {**t, Q: np.ascontiguousarray(t[Q].T)}),
        "q_proj.lora_A.weight has shape",
    ),
    "wrong_rank": (lambda d: edit_config(d, r=4), "has shape"),
    "nan": (lambda d: edit_tensors(d, lambda t: {**t, Q: t[Q] * np.nan}), "holds NaN"),
    "magnitude": (
        lambda d: edit_tensors(d, lambda t: {**t, Q.replace("lora_A.weight", "lora_magnitude_vector"): t[Q]}),
        "magnitude",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_are_named(fault, tmp_path):
    _, params, spec, adapters = case("default")
    save_peft(tmp_path, adapters, spec)
    change, message = BAD[fault]
    change(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_peft(tmp_path, params)
    assert "\n" not in str(error.value) and "adapter_" in str(error.value)


def test_bfloat16_and_named_adapter_keys_are_read(tmp_path):
    import ml_dtypes

    _, params, spec, adapters = case("default")
    save_peft(tmp_path, adapters, spec)
    edit_tensors(
        tmp_path,
        lambda t: {k.replace(".weight", ".default.weight"): v.astype(ml_dtypes.bfloat16) for k, v in t.items()},
    )
    loaded, _ = load_peft(tmp_path, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    chex.assert_trees_all_close(loaded, adapters, rtol=1e-2)


def test_nothing_is_written_for_adapters_that_are_not_finite(tmp_path):
    _, _, spec, adapters = case("default")
    adapters["model"]["layers"]["self_attn"]["q_proj"]["lora_b"] *= np.nan
    with pytest.raises(InputError, match="nothing was written"):
        save_peft(tmp_path / "out", adapters, spec)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    _, _, spec, adapters = case("default")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the adapter to"):
        save_peft(tmp_path / "file" / "out", adapters, spec)
