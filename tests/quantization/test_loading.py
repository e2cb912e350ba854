"""Quantised bases out of files, ours and bitsandbytes'."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from stablelora_jax import InputError, load_pretrained, save_pretrained
from stablelora_jax.models.pretrained import safetensors as weights
from stablelora_jax.parallel import mesh_layout, pmap_layout
from stablelora_jax.quantization import dequantize_tree, is_quantized, nf4, quantize_params
from tests.helpers import jit, tiny_decoder
from tests.quantization import golden

KINDS = ("int8", "nf4")
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIG |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": None}


@pytest.fixture
def saved(tmp_path):
    model, params = tiny_decoder(qkv_bias=True, o_bias=True)
    save_pretrained(tmp_path / "m", model, params)
    return tmp_path / "m", params


@pytest.mark.parametrize("kind", KINDS)
def test_loading_is_quantising(saved, kind):
    directory, params = saved
    model, found = load_pretrained(directory, quantize=kind)
    wanted = jit(lambda tree: quantize_params(tree, kind))(params)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6)  # codes are equal, means nearly
    assert model == load_pretrained(directory)[0]
    _, half = load_pretrained(directory, quantize=kind, dtype=jnp.bfloat16)
    leaf = half["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert leaf.dtype == jnp.bfloat16 and dequantize_tree(leaf).dtype == jnp.bfloat16
    assert half["model"]["layers"]["self_attn"]["q_proj"]["bias"].dtype == jnp.bfloat16
    single = found["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    chex.assert_trees_all_equal(jax.tree.leaves(leaf), jax.tree.leaves(single))  # from the file's own numbers


@pytest.mark.parametrize("kind", KINDS)
def test_saving_dequantises(saved, tmp_path, kind):
    directory, _ = saved
    model, params = load_pretrained(directory, quantize=kind)
    save_pretrained(tmp_path / "again", model, params, max_shard_size=4000)
    chex.assert_trees_all_equal(load_pretrained(tmp_path / "again")[1], dequantize_tree(params))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"


def test_one_tensor_of_the_file_is_held_at_a_time(saved, monkeypatch):
    largest = []
    aligned = weights._aligned
    monkeypatch.setattr(weights, "_aligned", lambda shape, dtype: largest.append(shape) or aligned(shape, dtype))
    load_pretrained(saved[0], quantize="nf4")
    assert not [shape for shape in largest if len(shape) == 3]  # no stack of kernels is made


@pytest.mark.parametrize("layout", [pmap_layout, mesh_layout], ids=["pmap", "mesh"])
def test_layouts_place_what_is_loaded(saved, layout):
    _, params = load_pretrained(saved[0], quantize="nf4", sharding=layout().base_sharding)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(params))
    with pytest.raises(InputError, match=r"^model\.layers\.\w+\.\w+ is quantised, which only data can spread"):
        load_pretrained(saved[0], quantize="nf4", sharding=mesh_layout(fsdp=2).base_sharding)


def test_what_cannot_be_loaded(saved):
    with pytest.raises(InputError, match="quantize must be one of int8, nf4, not 'int4'"):
        load_pretrained(saved[0], quantize="int4")
    tensors = load_file(saved[0] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.inf
    save_file(tensors, saved[0] / "model.safetensors")
    with pytest.raises(InputError, match="model.layers.1.mlp.up_proj.weight holds NaN or infinite"):
        load_pretrained(saved[0], quantize="nf4")


def packed(directory, config=CONFIG, change=lambda tensors: None, state=None):
    """Rewrite the checkpoint as bitsandbytes would have saved it, by the tests' own transcription."""
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        weight = tensors.pop(name)
        made, size = golden.nf4(weight), {"blocksize": 64, "nested_blocksize": 256, "quant_type": "nf4"}
        own = size | {"dtype": "bfloat16", "nested_dtype": "float32", "shape": list(weight.shape)}
        own |= {"nested_offset": float(made["nested_offset"]), **(state or {})}
        tensors |= {
            name: made["packed"][:, None],
            f"{name}.absmax": made["absmax"],
            f"{name}.quant_map": golden.LEVELS.astype(np.float32),
            f"{name}.nested_absmax": made["nested_absmax"].astype(np.float32),
            f"{name}.nested_quant_map": golden.dynamic_map().astype(np.float32),
            f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(own).encode(), np.uint8),
        }
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_bitsandbytes_checkpoints_are_taken_over(saved, quantize):
    directory, params = saved
    packed(directory)
    model, found = load_pretrained(directory, quantize=quantize)
    wanted = jit(lambda tree: quantize_params(tree, "nf4"))(params)
    up, own = (tree["model"]["layers"]["mlp"]["up_proj"]["kernel"] for tree in (found, wanted))
    assert np.array_equal(up.packed, own.packed) and up.shape == own.shape
    leaves = jax.tree.leaves(found, is_leaf=is_quantized)
    assert sum(map(is_quantized, leaves)) == 7
    chex.assert_trees_all_close(dequantize_tree(found), dequantize_tree(wanted), atol=0.02)  # one code of eight bits
    assert model.config == load_pretrained(directory)[0].config


NAME, HEAD, STATE = "model.layers.1.mlp.up_proj.weight", "lm_head.weight", ".quant_state.bitsandbytes__nf4"
BAD = {
    "int8": (dict(config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "quantization_config = .* only NF4"),
    "gptq": (dict(config={"quant_method": "gptq", "bits": 4}), "quantization_config = .* only NF4"),
    "single": (dict(config=CONFIG | {"bnb_4bit_use_double_quant": False}), "quantization_config = .* only NF4"),
    "blocks": (dict(state={"blocksize": 128}), "has blocks or a shape that are not read"),
    "shape": (dict(state={"shape": [24, 15]}), r"has shape \(24, 15\), its configuration says"),
    "offset": (dict(state={"nested_offset": None}), "is not what bitsandbytes writes"),
    "nan": (dict(state={"nested_offset": float("nan")}), "is not what bitsandbytes writes"),
    "huge": (dict(state={"nested_offset": 1e300}), "is not what bitsandbytes writes"),
    "endless": (dict(state={"shape": [float("inf"), 16]}), "is not what bitsandbytes writes"),
    "json": (dict(change=lambda t: t.update({NAME + STATE: np.zeros(3, np.uint8)})), "is not what bitsandbytes writes"),
    "levels": (dict(change=lambda t: t[NAME + ".quant_map"].__imul__(1.5)), "quant_map holds other levels"),
    "part": (dict(change=lambda t: t.pop(NAME + ".absmax")), f"lacks tensors: {NAME}.absmax"),
    "short": (dict(change=lambda t: t.update({NAME: t[NAME][:5]})), f"{NAME} is not 192 finite numbers of uint8"),
    "mixed": (
        dict(change=lambda t: [t.pop(n) for n in list(t) if NAME in n] and t.update({NAME: np.ones((24, 16))})),
        f"{NAME} is not quantised, as other layers are",
    ),
    "head": (dict(change=lambda t: t.update({HEAD: np.zeros((31, 16), np.uint8)})), f"{HEAD} holds uint8"),
}


@pytest.mark.parametrize(("how", "message"), BAD.values(), ids=BAD.keys())
def test_other_checkpoints_are_refused(saved, how, message):
    packed(saved[0], **how)
    with pytest.raises(InputError, match=message):
        load_pretrained(saved[0])


def test_a_checkpoint_is_quantised_once(saved):
    packed(saved[0])
    with pytest.raises(InputError, match="is quantised to nf4 already: leave quantize='int8' out"):
        load_pretrained(saved[0], quantize="int8")


def test_shardings_of_parts(saved):
    paths = []
    spec = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec())
    load_pretrained(saved[0], quantize="nf4", sharding=lambda path, shape: paths.append(path) or spec)
    assert ("model", "layers", "mlp", "up_proj", "kernel", "nested_offset") in paths
    assert nf4.NF4.__dataclass_fields__.keys() >= {path[-1] for path in paths if "kernel" in path[:-1]}
