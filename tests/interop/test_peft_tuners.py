"""Files of PEFT's other tuners: what PEFT wrote is read, what is written PEFT reads, and faults are named."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, load_peft, save_peft, save_pretrained
from stablelora_jax.interop.warm_start import start_adapters
from stablelora_jax.lora.leaf_checks import require_leaves
from stablelora_jax.lora.peft_tuners import COMMON, TUNERS
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.utils import tree
from tests.helpers import jit, long, tiny_decoder, tokens
from tests.lora.test_parametrizations import MEMBERS, moved, spec_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "v_proj", "down_proj"]  # (16, 16), (16, 8) and (24, 16)


def pruned(peft, **keys):
    """AdaLoRA after its schedule: a module of full rank, one of rank 2, one of rank 0."""
    masks = {"q_proj": [True] * 4, "v_proj": [False, True, False, True], "down_proj": [False] * 4}
    names = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}
    table = {f"model.layers.{i}.{names[m]}.{m}.lora_E": mask for i in range(3) for m, mask in masks.items()}
    return peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, rank_pattern=table, **keys)


# PEFT's configuration, and the parametrisation that its file is read as
READ = {
    "vera": (lambda peft, **k: peft.VeraConfig(r=5, bias="vera_only", **k), "vera"),
    "randlora": (lambda peft, **k: peft.RandLoraConfig(r=3, randlora_alpha=2, **k), "randlora"),
    "randlora_sparse": (lambda peft, **k: peft.RandLoraConfig(r=3, sparse=True, randlora_alpha=2, **k), "randlora"),
    "miss": (lambda peft, **k: peft.MissConfig(r=3, **k), "miss"),
    "miss_mini": (lambda peft, **k: peft.MissConfig(r=3, init_weights="mini", mini_r=4, **k), "miss_mini"),
    "bat": (lambda peft, **k: peft.MissConfig(r=4, init_weights="bat", **k), "bat"),
    "shira": (lambda peft, **k: peft.ShiraConfig(r=2, random_seed=3, **k), "shira"),
    "vblora": (lambda peft, **k: peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, topk=3, **k), "vblora"),
    "adalora": (lambda peft, **k: peft.AdaLoraConfig(init_r=3, lora_alpha=6, total_step=10, **k), "adalora"),
    "adalora_pruned": (pruned, "adalora"),
    "loha": (lambda peft, **k: peft.LoHaConfig(r=2, alpha=5, rank_pattern={"v_proj": 3}, **k), "lora"),
    "lokr": (lambda peft, **k: peft.LoKrConfig(r=1, alpha=2, alpha_pattern={"v_proj": 3}, **k), "lora"),
    "lokr_both": (lambda peft, **k: peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=2, **k), "lora"),
    "lora_pissa": (lambda peft, **k: peft.LoraConfig(r=2, init_lora_weights="pissa", **k), "lora"),
    "lora_olora": (lambda peft, **k: peft.LoraConfig(r=2, init_lora_weights="olora", **k), "lora"),
}
QUICK = ("vera", "randlora", "miss_mini", "bat", "shira", "vblora", "adalora_pruned", "lokr", "loha", "lora_olora")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, its parameters, and how PyTorch loads it."""
    directory = tmp_path_factory.mktemp("base")
    model, params = tiny_decoder(qkv_bias=True)
    save_pretrained(directory, model, params)

    def load():
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    return model, params, load


def logits(model, params, spec, adapters):
    return jit(lambda a: adapted(model, spec).apply({"params": params, "lora": a}, tokens()))(adapters)


def theirs_of(load, directory):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(load(), directory).eval()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens()))).logits.numpy()


def close(found, expected):
    return np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*QUICK, *(long(name) for name in READ if name not in QUICK)])
def test_what_peft_wrote_is_read_and_written_again(name, base, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model, params, load = base
    config, form = READ[name]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(load(), config(peft, target_modules=TARGETS, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 3)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs_of(load, tmp_path / "theirs")
    adapters, spec = load_peft(tmp_path / "theirs", params)
    assert spec.parametrization == form
    require_leaves(find_target_modules(params, spec), adapters, spec)
    assert close(logits(model, params, spec, adapters), expected)
    peft_type = TUNERS[form].peft_type if form in TUNERS else "LORA"
    save_peft(tmp_path / "ours", adapters, spec, params=params, peft_type=peft_type)
    assert close(theirs_of(load, tmp_path / "ours"), expected)
    if name == "lora_olora":
        with pytest.raises(InputError, match="lora.init is olora in .* and kaiming here"):
            start_adapters(tmp_path / "theirs", params, dataclasses.replace(spec, init="kaiming"))
    if form == "lora":
        return
    again, same = load_peft(tmp_path / "ours", params)
    assert same == spec
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, adapters)
    own, first = (load_file(tmp_path / d / WEIGHTS) for d in ("ours", "theirs"))
    for key, tensor in own.items():
        np.testing.assert_allclose(tensor, first[key].astype(np.float32), rtol=1e-6, err_msg=key)
    masks = [json.loads((tmp_path / d / CONFIG).read_text()).get("rank_pattern") for d in ("ours", "theirs")]
    assert masks[0] == (masks[1] and {key: mask for key, mask in masks[1].items() if not all(mask)})
    copies = {key for key in first if re.search(r"layers.*randlora_[AB]$", key)}
    assert own.keys() == first.keys() - copies


# Adapters of ours, whose scales, names and ranks a tuner of PEFT's has no words for
WRITTEN = {
    "vera": dict(alpha_pattern={"v_proj": 3}, layers_to_transform=(0, 2)),
    "randlora": dict(alpha=3, alpha_pattern={"layers.1.self_attn.v_proj": 9}),
    "miss": dict(exclude_modules=["layers.1.self_attn.v_proj"]),
    "shira": dict(alpha=9, alpha_pattern={"v_proj": 2}, layers_to_transform=(0, 2)),
    "vblora": dict(options={"vectors": 6, "length": 4}, alpha=9),
    "adalora": dict(scaling="rslora", rank_pattern={"v_proj": 2}, target_modules=r".*\.[qv]_proj"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITTEN)
def test_peft_reads_what_began_here(name, base, tmp_path):
    pytest.importorskip("peft")
    model, params, load = base
    more = {"target_modules": TARGETS, "exclude_modules": ["layers.1.mlp.down_proj"], **WRITTEN[name]}
    made = dict(rank=3, bias="lora_only" if name == "vera" else "none", parametrization=name, init=MEMBERS[name][2])
    spec = LoraSpec(**made, **more)
    adapters = moved(jit(lambda params: init_adapters(jax.random.key(0), params, spec))(params))
    for path, target in find_target_modules(params, spec).items():  # layers without an adapter get no gradient
        node, used = tree.get_in(adapters, path), np.array(target.ranks) > 0
        own = {key: leaf for key, leaf in node.items() if key.startswith("lora_") and key != "lora_full"}
        own = {key: leaf * used.reshape(-1, *(1,) * (leaf.ndim - 1)) for key, leaf in own.items()}
        adapters = tree.set_in(adapters, path, {**node, **own})
    expected = logits(model, params, spec, adapters)
    save_peft(tmp_path, adapters, spec, params=params, peft_type=name.upper())
    assert close(theirs_of(load, tmp_path), expected)
    loaded, read = load_peft(tmp_path, params)
    assert read.parametrization == name
    assert close(logits(model, params, read, loaded), expected)


def edit(directory, change=None, **keys):
    """Change the tensors of a file by ``change``, and keys of its configuration."""
    path = directory / CONFIG
    config = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DROP"}))
    if change:
        tensors = change(load_file(directory / WEIGHTS))
        save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, directory / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj."
without = lambda name: lambda t: {key: tensor for key, tensor in t.items() if key != name}
instead = lambda name, change: lambda t: {**t, name: change(t[name])}
MASK = {"model.layers.0.self_attn.q_proj.lora_E": [True, False]}
BAD = {
    "no_factors": ("vera", dict(change=without("base_model.vera_A")), "lacks vera_A, which only PyTorch could draw"),
    "few_columns": ("vera", dict(change=instead("base_model.vera_A", lambda a: a[:, :3])), "q_proj.vera_A has shape"),
    "other_rank": ("vera", dict(r=2), "has shape"),
    "no_rank": ("vera", dict(r="DROP"), "the key r is missing"),
    "missing": ("vera", dict(change=without(Q + "vera_lambda_d")), "lacks .*q_proj.vera_lambda_d"),
    "extra": ("miss", dict(change=lambda t: {**t, Q + "miss_other": t[Q + "miss_block"]}), "holds .*miss_other"),
    "transposed": ("miss", dict(change=instead(Q + "miss_block", lambda d: d.T)), "miss_block has shape"),
    "nan": ("miss", dict(change=instead(Q + "miss_block", lambda d: d * np.nan)), "holds NaN"),
    "mode": ("miss", dict(init_weights="cat"), "init_weights = 'cat' is not supported"),
    "unknown": ("miss", dict(lora_alpha=4), "'lora_alpha' is no key of PEFT's MissConfig"),
    "dora": ("adalora", dict(use_dora=True), "use_dora = True is not supported"),
    "mask": ("adalora", dict(rank_pattern=MASK), "rank_pattern must have 3 times true or false for .*q_proj.lora_E"),
    "masks": ("adalora", dict(rank_pattern=[1]), "rank_pattern must map modules to masks"),
    "narrow": ("adalora", dict(change=instead(Q + "lora_B", lambda b: b[:, :2])), "q_proj.lora_B has shape"),
    "no_bank": ("vblora", dict(change=without("base_model.vblora_vector_bank")), "lacks vblora_vector_bank"),
    "axes": ("vblora", dict(change=instead(Q + "vblora_logits_B", lambda b: b[:1])), "logits_B has shape"),
    "topk": ("vblora", dict(save_only_topk_weights=True), "save_only_topk_weights = True is not supported"),
    "place": ("shira", dict(change=instead(Q + "shira_indices", lambda i: i + 9)), "a place outside of the weight"),
    "places": ("shira", dict(change=instead(Q + "shira_indices", lambda i: i[0])), r"must be \(2, n\) places"),
    "tuner": ("miss", dict(peft_type="OFT"), "peft_type = 'OFT' is not supported: a spec is one of LORA, VERA"),
}


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """A file of each tuner, by name; what is changed in a test is a copy."""
    _, params, _ = base
    found = {}
    for name in {name for name, _, _ in BAD.values()}:
        spec, found[name] = spec_of(name, rank=3, target_modules=["q_proj"]), tmp_path_factory.mktemp(name)
        save_peft(
            found[name], init_adapters(jax.random.key(0), params, spec), spec, params=params, peft_type=name.upper()
        )
    return found


@pytest.mark.parametrize("fault", BAD)
def test_faults_of_a_file_are_named(fault, base, written, tmp_path):
    name, changes, message = BAD[fault]
    shutil.copytree(written[name], tmp_path / "copy")
    edit(tmp_path / "copy", **changes)
    with pytest.raises(InputError, match=message) as error:
        load_peft(tmp_path / "copy", base[1])
    assert "\n" not in str(error.value) and "adapter_" in str(error.value)


HADA = {f"hada_{k}": np.ones(s, np.float32) for k, s in {"w1_a": (16, 2), "w1_b": (2, 16), "w2_a": (16, 2)}.items()}
HADAMARD = {
    "missing": ({}, "q_proj of hada_w1_a .* is no change of a linear layer"),
    "sizes": ({"hada_w2_b": np.ones((2, 8), np.float32)}, "no change of a linear layer"),
    "convolution": ({"hada_w2_b": HADA["hada_w1_b"], "hada_t1": np.ones((2, 2, 3, 3), np.float32)}, "hada_t1 .2, 2, 3"),
}


@pytest.mark.parametrize("fault", HADAMARD)
def test_faults_of_a_hadamard_product_are_named(fault, base, written, tmp_path):
    change, message = HADAMARD[fault]
    shutil.copytree(written["miss"], tmp_path / "copy")
    edit(tmp_path / "copy", lambda _: {Q + key: tensor for key, tensor in (HADA | change).items()}, peft_type="LOHA")
    with pytest.raises(InputError, match=message):
        load_peft(tmp_path / "copy", base[1])


def test_what_a_tuner_cannot_say_is_named(base, tmp_path):
    _, params, _ = base
    spec = spec_of("miss", rank=3, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    adapters = init_adapters(jax.random.key(0), params, spec)
    for peft_type, given, message in (
        ("MISS", params, r"PEFT's MISS has one rank for all modules, not \[2, 3\]"),
        ("VERA", params, "peft_type='VERA' is for vera adapters, not miss: leave it out"),
        ("OFT", params, "peft_type must be LORA or one of VERA, RANDLORA, MISS, .*, not 'OFT'"),
        ("MISS", None, "pass params="),
    ):
        with pytest.raises(InputError, match=message):
            save_peft(tmp_path / "out", adapters, spec, params=given, peft_type=peft_type)
    for name, given, message in (
        ("vera", dict(target_modules=["embed_tokens"]), "PEFT has no vera for an embedding"),
        ("shira", dict(target_modules=["q_proj"], bias="all"), "PEFT's shira trains no biases: leave peft_type out"),
        ("vblora", dict(alpha_pattern={"v_proj": 2}), r"one bank and no scale, not scales \[2.0, 16.0\]"),
    ):
        spec = spec_of(name, rank=1, **given)
        adapters = init_adapters(jax.random.key(0), params, spec)
        with pytest.raises(InputError, match=message):
            save_peft(tmp_path / "out", adapters, spec, params=params, peft_type=name.upper())
    assert not (tmp_path / "out").exists()


# A configuration, what a spec means by it, and a value that no spec means
CONFIGS = {
    "vera": (
        dict(vera_dropout=0.1, bias="vera_only"),
        dict(rank=256, alpha=8, scaling="none", dropout=0.1, bias="lora_only"),
        dict(d_initial=0.3),
    ),
    "randlora": (dict(r=4), dict(rank=4, alpha=640), dict(sparse=True)),
    "miss": (dict(mini_r=3), dict(rank=64, alpha=8, scaling="none"), dict(init_weights=False)),
    "bat": (dict(init_weights="bat"), dict(rank=64, alpha=8, scaling="none"), dict(fan_in_fan_out=True)),
    "shira": (dict(r=4, random_seed=3), dict(rank=4, alpha=8, scaling="none"), dict(init_weights=False)),
    "vblora": (
        dict(topk=3, vector_length=16, bias="vblora_only"),
        dict(rank=4, alpha=8, scaling="none", bias="lora_only", options=dict(topk=3, length=16, vectors=256)),
        dict(save_only_topk_weights=True),
    ),
    "miss_mini": (
        dict(init_weights="mini", mini_r=3),
        dict(rank=64, alpha=8, scaling="none", options={"mini_r": 3}),
        dict(fan_in_fan_out=True),
    ),
    "adalora": (
        dict(init_r=5, total_step=7, use_rslora=True),
        dict(rank=5, alpha=8, init="init_ab"),
        dict(loftq_config={"loftq_bits": 4}),
    ),
}


@pytest.mark.parametrize("form", CONFIGS)
def test_a_configuration_alone(form):
    peft = pytest.importorskip("peft")
    keys, meaning, other = CONFIGS[form]
    tuner = TUNERS[form]
    config = {"peft_type": tuner.peft_type, "target_modules": ["q_proj"], **keys}
    expected = LoraSpec(target_modules=["q_proj"], parametrization=form, **meaning)
    assert LoraSpec.from_peft(config) == expected
    theirs = getattr(peft, tuner.config)
    assert LoraSpec.from_peft(theirs(target_modules=["q_proj"], **keys).to_dict()) == expected
    with pytest.raises(InputError, match=f"^{next(iter(other))} = .* is not supported") as error:
        LoraSpec.from_peft(config | other)
    assert "\n" not in str(error.value)
    fields = {field.name for field in dataclasses.fields(theirs)}
    known = {*COMMON, *tuner.renamed, *tuner.ignored, *tuner.neutral, *tuner.options, "peft_type"}
    assert (fields <= known or tuner.of_lora) and {*tuner.written, *tuner.options} <= fields
    assert set(COMMON) - fields == set(tuner.lacks)
