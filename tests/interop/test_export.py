"""A run or an adapter goes out to PEFT, vLLM, llama.cpp or as a merged model: whole, or not at all."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, init_adapters, load_peft, load_pretrained, merge, save_peft
from stablelora_jax import base_directory as shipped_base
from stablelora_jax.config.run import ModelConfig, RunConfig
from stablelora_jax.interop.export import KINDS, BaseOptions, export, locate_adapter, open_source, read_base_options
from stablelora_jax.interop.metadata import load_metadata
from stablelora_jax.models.pretrained.load import save_pretrained
from stablelora_jax.models.untie import untie
from stablelora_jax.quantization import is_quantized
from stablelora_jax.runs.directory import create, locate
from tests.helpers import largest_difference, tiny_decoder, trained

SPEC = LoraSpec(rank=4, scaling="rslora", target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.*q_proj": 2})


@pytest.fixture
def adapter(tmp_path):
    """A PEFT directory that names its base, and the adapters in it."""
    model, params = tiny_decoder()
    save_pretrained(tmp_path / "base", model, params)
    adapters = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    metadata = {"optimizer": {"name": "stable_lora"}}
    save_peft(tmp_path / "adapter", adapters, SPEC, base_model=str(tmp_path / "base"), metadata=metadata)
    return tmp_path / "adapter", params, adapters


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_out_means_the_same(kind, adapter):
    path, params, adapters = adapter
    said = []
    out = export(path, kind, log_fn=said.append)
    assert out == path / "export" / ("adapter.gguf" if kind == "gguf" else kind) and len(said) == 1
    expected = merge(params, adapters, SPEC)
    if kind == "merged":
        assert "its logits differ from those of base and adapter by at most" in said[0]
        assert largest_difference(load_pretrained(out)[1], expected) < 1e-6
    elif kind == "gguf":
        assert out.read_bytes()[:4] == b"GGUF"  # its content: tests/interop/test_gguf_adapter.py
    else:
        loaded, spec = load_peft(out, params)
        assert largest_difference(merge(params, loaded, spec), expected) < 1e-6
    if kind == "vllm":
        assert "--max-lora-rank 8" in said[0]
    if kind == "peft":
        kept = load_metadata(out)
        assert kept.pop("base")["name"] == str(path.parent / "base") and kept == load_metadata(path)
    assert not list(out.parent.glob(".*"))
    with pytest.raises(InputError, match="exists already: remove it or choose another --output"):
        export(path, kind)


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_a_merged_model_is_rounded_once(adapter, dtype):
    path, params, adapters = adapter
    said = []
    out = export(path, "merged", dtype=dtype, log_fn=said.append)
    written = jnp.dtype(dtype or "float32")
    expected = jax.tree.map(lambda leaf: leaf.astype(written), merge(params, adapters, SPEC))
    chex.assert_trees_all_equal(load_pretrained(out, dtype=written)[1], expected)
    assert f"a merged model in {written}" in said[0]
    rounded = merge(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), adapters, SPEC)
    kernel = lambda tree: np.asarray(tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"], np.float32)
    assert (kernel(rounded) != kernel(expected)).any(), "a base rounded before the merge would show"


def test_the_base_and_the_dtype_may_be_given(adapter, tmp_path):
    path, params, _ = adapter
    other, others = tiny_decoder()
    save_pretrained(tmp_path / "other", other, jax.tree.map(lambda leaf: 2 * leaf, others))
    source = open_source(path, str(tmp_path / "other"), "bfloat16")
    assert source.base == str(tmp_path / "other") and source.model.dtype == jnp.bfloat16
    doubled = jax.tree.map(lambda leaf: (2 * leaf).astype(jnp.bfloat16), params)
    chex.assert_trees_all_equal(source.params, doubled)
    assert open_source(path).base == str(path.parent / "base") and open_source(path).model.dtype == jnp.float32


def test_an_adapter_s_base_is_quantised_as_in_training(adapter, tmp_path):
    """Its directory says so wherever it goes, since the same numbers mean another model on a dense base."""
    path, params, adapters = adapter
    about = {"base_model": str(path.parent / "base"), "metadata": {"quantize": "int8"}}
    save_peft(tmp_path / "own", adapters, SPEC, **about)
    for directory in (tmp_path / "own", export(tmp_path / "own", "peft")):
        source = open_source(directory)
        leaves = jax.tree.leaves(source.params, is_leaf=is_quantized)
        assert sum(map(is_quantized, leaves)) == 7
        chex.assert_trees_all_equal(source.params, load_pretrained(path.parent / "base", quantize="int8")[1])
    save_peft(tmp_path / "odd", adapters, SPEC, **{**about, "metadata": {"quantize": ["nf4"]}})
    with pytest.raises(InputError, match=r"stablelora.json: quantize must be one of int8, nf4, not \['nf4'\]"):
        open_source(tmp_path / "odd")


def test_a_run_names_its_base_and_its_dtype(tmp_path):
    model, params = load_pretrained(shipped_base())
    config = RunConfig(lora=SPEC, model=ModelConfig(dtype="bfloat16", untie=True), output=str(tmp_path / "run"))
    create(locate(config), config)
    with pytest.raises(InputError, match="has no adapter yet"):
        export(tmp_path / "run", "peft")
    spec = LoraSpec(rank=2, modules_to_save=["lm_head"])
    source = open_source_after_saving(tmp_path / "run", spec)
    assert source.model.dtype == np.dtype("bfloat16") and not source.model.config.tie_word_embeddings
    assert source.base == str(shipped_base()) and source.spec == spec
    assert open_source(tmp_path / "run", dtype="float32").model.dtype == np.dtype("float32"), "unless given"


def open_source_after_saving(run, spec):
    model, params = untie(*load_pretrained(shipped_base(), dtype="bfloat16"))
    save_peft(run / "adapter", init_adapters(jax.random.key(0), params, spec), spec, params=params)
    return open_source(run)


def write_run(directory, text, untied=True, **metadata):
    """A run directory with ``text`` as its config.yaml, and an adapter whose stablelora.json has ``metadata``."""
    spec = LoraSpec(rank=2, target_modules=["lm_head" if untied else "q_proj"])
    model, params = load_pretrained(shipped_base(), dtype="bfloat16")
    params = untie(model, params)[1] if untied else params
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    about = {"base_model": str(shipped_base()), "params": params, "metadata": metadata}
    save_peft(directory / "adapter", adapters, spec, **about)
    (directory / "config.yaml").write_text(text)
    return adapters


OLD_RUN = """\
model: {path: null, dtype: bfloat16, untie: true, remat: useful, attention: blocks}
lora: {target: [lm_head], rank: 2}
length: 64
clip_norm: 1.0
"""


def test_an_adapter_alone_knows_how_its_base_was_loaded(tmp_path):
    adapters = write_run(tmp_path / "run", "", dtype="bfloat16", untie=True, steps=3)
    shutil.move(tmp_path / "run" / "adapter", tmp_path / "alone")
    source = open_source(tmp_path / "alone")
    assert source.model.dtype == jnp.bfloat16 and not source.model.config.tie_word_embeddings
    assert source.metadata["steps"] == 3 and read_base_options(tmp_path / "alone") == BaseOptions(
        str(shipped_base()), "bfloat16", True, None
    )
    chex.assert_trees_all_equal(source.adapters, adapters)
    assert open_source(tmp_path / "alone", dtype="float32").model.dtype == jnp.float32


def test_a_run_of_an_older_version_is_exported(tmp_path):
    """Its stablelora.json says nothing of the base, its config.yaml has keys of then; what goes out says it."""
    adapters = write_run(tmp_path / "run", OLD_RUN)
    assert "dtype" not in load_metadata(tmp_path / "run" / "adapter")
    out = export(tmp_path / "run", "peft")
    assert {"dtype": "bfloat16", "untie": True}.items() <= load_metadata(out).items()
    again = open_source(out)
    assert again.model.dtype == jnp.bfloat16 and not again.model.config.tie_word_embeddings
    chex.assert_trees_all_equal(again.adapters, adapters)
    with pytest.raises(InputError, match="are tied: untie them first"):
        open_source(tmp_path / "run" / "adapter")
    assert export(tmp_path / "run" / "adapter", "merged", untie=True, output=tmp_path / "merged").is_dir()


DAMAGED = {
    "not YAML": ("model: [", "not the config.yaml of a run: .*; export the run's adapter/ instead"),
    "empty": ("", "not the config.yaml of a run"),
    "no model": ("length: 64", "not the config.yaml of a run: 'model'; export"),
    "a list": ("model: [1]", "not the config.yaml of a run: model must be a mapping; export"),
    "dtype": ("model: {dtype: 3}", "config.yaml: dtype must be one of float32, bfloat16, float16, float64, not 3"),
    "untie": ("model: {untie: x}", "config.yaml: untie must be true or false, not 'x'"),
    "quantize": ("model: {quantize: [nf4]}", r"config.yaml: quantize must be one of int8, nf4, not \['nf4'\]"),
    "path": ("model: {path: 3}", "the name of the base must be a string, not 3"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    directory = tmp_path_factory.mktemp("damaged")
    write_run(directory, "", untied=False)
    return directory


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_config_is_one_line(case, damaged, tmp_path):
    text, message = DAMAGED[case]
    (damaged / "config.yaml").write_text(text)
    for act in (open_source, lambda path: export(path, "peft", output=tmp_path / "out")):
        with pytest.raises(InputError, match=message) as error:
            act(damaged)
        assert "\n" not in str(error.value) and str(damaged) in str(error.value)
    assert not (tmp_path / "out").exists() and locate_adapter(damaged) == damaged / "adapter"
    assert open_source(damaged / "adapter").model.dtype == jnp.float32, "the adapter is sound"


def test_a_config_that_is_not_text_is_one_line(damaged):
    (damaged / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not the config.yaml of a run"):
        read_base_options(damaged)


@pytest.mark.parametrize("key,value", [("dtype", 3), ("dtype", "int8"), ("dtype", {}), ("untie", "x"), ("untie", 1)])
def test_bad_values_of_an_adapter_alone_are_one_line(key, value, adapter):
    about = {**load_metadata(adapter[0]), key: value}
    (adapter[0] / "stablelora.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=rf"stablelora.json: {key} must be .*, not {re.escape(repr(value))}") as error:
        open_source(adapter[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype,message", [("float33", "dtype must be a dtype"), ("int32", "dtype must be floating")])
def test_a_merged_model_has_a_floating_dtype(dtype, message, adapter):
    with pytest.raises(InputError, match=message):
        export(adapter[0], "merged", dtype=dtype)
    assert not (adapter[0] / "export").exists()


def test_a_failure_leaves_nothing_behind(adapter, tmp_path):
    path, params, _ = adapter
    dora = LoraSpec(rank=2, parametrization="dora")
    save_peft(
        tmp_path / "dora", init_adapters(jax.random.key(0), params, dora), dora, base_model=str(path.parent / "base")
    )
    for kind in ("vllm", "gguf"):
        with pytest.raises(InputError, match="merged"):
            export(tmp_path / "dora", kind, output=tmp_path / "out" / kind)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(path="nowhere"), "neither a run directory"),
        (dict(base="no/such base"), "does not exist: give a model directory"),
        (dict(kind="onnx"), "--to must be one of peft, vllm, gguf, merged"),
        (dict(output="file/out"), "cannot write"),
    ],
)
def test_refusals(change, message, adapter, tmp_path):
    (tmp_path / "file").write_text("")
    given = {"path": adapter[0], "kind": "peft", "base": None, "output": "out"} | change
    output = tmp_path / given["output"]
    with pytest.raises(InputError, match=message) as error:
        export(given["path"], given["kind"], base=given["base"], output=output)
    assert "\n" not in str(error.value)


def test_an_adapter_without_a_base_asks_for_one(adapter, tmp_path):
    path, params, adapters = adapter
    save_peft(tmp_path / "alone", adapters, SPEC)
    with pytest.raises(InputError, match="does not name its base: give --base MODEL"):
        export(tmp_path / "alone", "peft")
    assert export(tmp_path / "alone", "peft", base=str(path.parent / "base")).is_dir()


def test_the_command(adapter, tmp_path):
    script = [sys.executable, str(Path(__file__).parents[2] / "experiments" / "export.py")]
    wrong = subprocess.run([*script, str(tmp_path / "base"), "--to", "peft"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
    good = subprocess.run([*script, str(adapter[0]), "--to", "merged"], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert (adapter[0] / "export" / "merged" / "model.safetensors").is_file() and "largest logit" in good.stdout
