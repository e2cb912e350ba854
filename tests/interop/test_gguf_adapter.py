"""Adapters as GGUF files: by llama.cpp's own rule they change a GGUF base exactly as merging does."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from stablelora_jax import LoraSpec, init_adapters, load_pretrained, merge
from stablelora_jax.interop.gguf_adapter import save_gguf_adapter
from stablelora_jax.lora.leaves import trains_pairs
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from tests.helpers import FOREIGN, random_params, trained

gguf = pytest.importorskip("gguf")

from tests.models.gguf_files import HEADS, HIDDEN, KV_HEADS, LAYERS, hf_tensors, write  # noqa: E402

ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
SPECS = {
    "plain": LoraSpec(rank=3, alpha=7, target_modules=ALL),
    "rslora": LoraSpec(rank=3, alpha=7, target_modules=ALL, scaling="rslora"),
    "ranks": LoraSpec(rank=6, alpha=7, target_modules=ALL, rank_pattern={"layers.1.self_attn.q_proj": 2, "k_proj": 49}),
    "rslora_ranks": LoraSpec(rank=3, alpha=7, target_modules=ALL, scaling="rslora", rank_pattern={"k_proj": 2}),
    "alphas": LoraSpec(rank=3, alpha=7, target_modules=ALL, alpha_pattern={"k_proj": 2, "layers.0.mlp.up_proj": 0.5}),
    "layers": LoraSpec(rank=2, alpha=7, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    "miss": LoraSpec(rank=2, parametrization="miss", target_modules=ALL),
    "pissa": LoraSpec(rank=2, init="pissa", target_modules=ALL),
    "ends": LoraSpec(
        rank=2, alpha=7, target_modules=["q_proj", "embed_tokens", "lm_head"], alpha_pattern={"lm_head": 3}
    ),
}
BIASES = {"qwen2": tuple(f"self_attn.{n}_proj" for n in "qkv")}


def base(directory, arch="llama", tied=False):
    tensors = hf_tensors(tied, BIASES.get(arch, ()), qk_norm=arch == "qwen3")
    return load_pretrained(write(directory / "base.gguf", tensors, arch))


def adapters_of(params, spec):
    if not trains_pairs(spec):
        return jax.tree.map(lambda x: x + 0.3, init_adapters(jax.random.key(0), params, spec))
    return trained(init_adapters(jax.random.key(0), params, spec), spec)


def read(path):
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def applied(directory, arch):
    """``base.gguf`` with the adapter merged into its own tensors, as llama.cpp would compute; loaded again."""
    (keys, pairs), (_, own) = read(directory / "adapter.gguf"), read(directory / "base.gguf")
    for name in {name.rpartition(".")[0] for name in pairs}:
        a, b = (pairs.pop(f"{name}.lora_{f}").astype(np.float64) for f in "ab")
        scale = keys["adapter.lora.alpha"] / b.shape[1]
        own[name] = (own[name] + scale * (a @ b.T if name == "token_embd.weight" else b @ a)).astype(np.float32)
    assert not pairs
    return load_pretrained(write(directory / "merged.gguf", {}, arch, raw=own))[1]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("case", SPECS)
def test_llama_cpps_rule_gives_the_merged_model(tmp_path, case, arch):
    spec, (model, params) = SPECS[case], base(tmp_path, arch)
    adapters = adapters_of(params, spec)
    save_gguf_adapter(tmp_path / "adapter.gguf", adapters, spec, model.config)
    expected, found = (flatten_dict(p) for p in (merge(params, adapters, spec), applied(tmp_path, arch)))
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, rtol=1e-5, atol=1e-5, err_msg=str(path))
    moved = sum(not np.array_equal(leaf, expected[path]) for path, leaf in flatten_dict(params).items())
    assert moved == {"layers": 2, "ends": 3}.get(case, 7)


def test_what_the_file_says(tmp_path):
    spec, (model, params) = SPECS["ranks"], base(tmp_path)
    adapters = adapters_of(params, spec)
    path = tmp_path / "new" / "adapter.gguf"
    save_gguf_adapter(path, adapters, spec, model.config)
    keys, tensors = read(path)
    assert keys.pop("adapter.lora.alpha") == 7 and set(keys) == {
        "general.architecture", "general.type", "adapter.type", "stablelora_jax.writer"
    }  # fmt: skip
    assert [keys[f"{name}"] for name in ("general.architecture", "general.type", "adapter.type")] == [
        "llama", "adapter", "lora"
    ]  # fmt: skip
    assert len(tensors) == 2 * 7 * LAYERS and all(array.dtype == np.float32 for array in tensors.values())
    assert tensors["blk.1.attn_q.weight.lora_a"].shape == (2, HIDDEN)  # padding is left out
    assert tensors["blk.0.attn_q.weight.lora_b"].shape == (HIDDEN, 6)
    assert [p.name for p in path.parent.iterdir()] == ["adapter.gguf"]
    layers = SPECS["layers"]
    save_gguf_adapter(path, adapters_of(params, layers), layers, model.config)
    assert {name.split(".")[1] for name in read(path)[1]} == {"1"}


@pytest.mark.parametrize("model_type, permuted", [("llama", True), ("mistral", True), ("qwen2", False)])
@pytest.mark.parametrize("case", ["plain", "rslora", "ranks"])
def test_factors_are_bit_equal_where_one_alpha_serves(tmp_path, case, model_type, permuted):
    """And the permutation is the converter's, spelled out row by row."""
    spec, (model, params) = SPECS[case], base(tmp_path)
    adapters, path = adapters_of(params, spec), tmp_path / "adapter.gguf"
    save_gguf_adapter(path, adapters, spec, dataclasses.replace(model.config, model_type=model_type))
    keys, tensors = read(path)
    assert keys["general.architecture"] == ("llama" if permuted else model_type)
    assert keys["adapter.lora.alpha"] == np.float32(7 * 3**0.5 if case == "rslora" else 7)
    for name, module, heads in (("q", "q_proj", HEADS), ("k", "k_proj", KV_HEADS), ("v", "v_proj", 0)):
        pair = tree.get_in(adapters, ("model", "layers", "self_attn", module))
        rank = spec.rank_of(f"model.layers.1.self_attn.{module}")
        a, b = np.asarray(pair["lora_a"])[1, :, :rank], np.asarray(pair["lora_b"])[1, :rank]
        rows, half = list(range(b.shape[1])), b.shape[1] // heads // 2 if heads else 0
        if permuted and heads:
            rows = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{name}.weight.lora_a"], a.T)
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{name}.weight.lora_b"], b.T[rows])


def test_what_llama_cpp_cannot_apply_is_refused_by_name(tmp_path):
    path, (model, params) = tmp_path / "adapter.gguf", base(tmp_path)

    def refused(match, spec, change=lambda adapters: adapters, config=model.config, params=params):
        with pytest.raises(InputError, match=match) as caught:
            save_gguf_adapter(path, change(adapters_of(params, spec)), spec, config)
        assert "\n" not in str(caught.value) and not path.exists()

    plain = SPECS["plain"]
    refused(
        r"q_proj\.lora_magnitude_vector.*merged", LoraSpec(rank=2, target_modules=["q_proj"], parametrization="dora")
    )
    refused(r"model\.norm\.lora_full\.scale.*merged", LoraSpec(rank=2, modules_to_save=["norm"]))
    at = ("model", "layers", "self_attn", "k_proj", "lora_b")
    for value in (np.nan, np.inf, 1e39):
        spoil = lambda x, v=value: tree.set_in(x, at, np.full(tree.get_in(x, at).shape, v))
        refused(r"blk\.0\.attn_k\.weight\.lora_b holds NaN", plain, spoil)
    tied = dataclasses.replace(model.config, tie_word_embeddings=True)
    refused(r"as model\.embed_tokens is.*merged", LoraSpec(rank=2, target_modules=["embed_tokens"]), config=tied)
    refused(r"as lm_head is.*merged", LoraSpec(rank=2, target_modules=["lm_head"]), config=tied)
    refused("'gpt2'", plain, config=dataclasses.replace(model.config, model_type="gpt2"))
    refused("the spec says 2", dataclasses.replace(plain, rank=2), lambda x: adapters_of(params, plain))
    refused("is not a positive float32", dataclasses.replace(plain, alpha=1e39))
    foreign, shape, spec = FOREIGN["dense_patterns"]
    refused("block_0 is not a weight", spec, params=random_params(foreign, np.zeros(shape, np.float32)))


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    spec, (model, params) = SPECS["layers"], base(tmp_path)
    adapters, path = adapters_of(params, spec), tmp_path / "adapter.gguf"
    save_gguf_adapter(path, adapters, spec, model.config)
    before = path.read_bytes()

    def full(self, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(InputError, match="No space left"):
        save_gguf_adapter(path, jax.tree.map(lambda x: x + 1, adapters), spec, model.config)
    assert path.read_bytes() == before
    monkeypatch.undo()
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", path / "below.gguf"):
        with pytest.raises(InputError, match="cannot write"):
            save_gguf_adapter(place, adapters, spec, model.config)
