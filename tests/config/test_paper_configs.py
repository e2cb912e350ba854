"""The paper's settings: every YAML traces at full size; the step of a small one is compiled without weights or data."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from stablelora_jax import InputError, base_directory, config, init_adapters, load_pretrained
from stablelora_jax.config.parallel import MeshConfig
from stablelora_jax.config.run import DataConfig, ModelConfig, RunConfig
from stablelora_jax.models.attention import SEGMENTS
from stablelora_jax.models.pretrained.shapes import KNOWN, architecture
from stablelora_jax.runs.dry_run import arguments, dry_run, flops_of, shapes
from tests.conftest import ROOT
from tests.helpers import long

PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
TASKS = ("hellaswag", "social_i_qa", "openbookqa", "arc_easy", "arc_challenge", "merged_qa", "metamathqa")
# (parameters, of which LoRA's at r = 8 on q_proj and v_proj: 8 (in + out) each)
COUNTS = {
    "Qwen/Qwen2-0.5B": (494_032_768, 24 * 8 * (2 * 896 + 896 + 128)),
    "Qwen/Qwen2-1.5B": (1_543_714_304, 28 * 8 * (2 * 1536 + 1536 + 256)),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, 16 * 8 * (2 * 2048 + 2048 + 512)),
    "meta-llama/Llama-3.2-3B": (3_212_749_824, 28 * 8 * (2 * 3072 + 3072 + 1024)),
}


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_there_is_one_for_each_model_and_task():
    found = {(c.model.path, c.task.name) for c in (config.load(RunConfig, path) for path in PAPER)}
    assert found == {(model, task) for model in KNOWN for task in TASKS} and len(PAPER) == 28


@pytest.mark.parametrize("path", [p if "merged_qa" in p.stem else long(p) for p in PAPER], ids=lambda p: p.stem)
def test_a_paper_setting_says_what_the_paper_says_and_traces_at_full_size(path):
    loaded = config.load(RunConfig, path)
    assert path.stem == f"{loaded.model.path.split('/')[1].lower()}-{loaded.task.name}"
    assert loaded.lora.rank == 8 and loaded.lora.target_modules == ("q_proj", "v_proj")
    optimizer = loaded.optimizer
    assert optimizer.name == "stable_lora" and (optimizer.b1, optimizer.b2) == (0.9, 0.999)
    assert optimizer.shrink_ratio in (5e-4, 1e-3, 2e-3, 5e-3) and 5e-5 <= optimizer.learning_rate <= 8e-4
    assert 2 <= loaded.lora.alpha / loaded.lora.rank <= 64
    made = shapes(loaded)
    before, *others = arguments(made)
    state, metrics = jax.eval_shape(made.step, before, *others)
    parameters, trained = COUNTS[loaded.model.path]
    devices = jax.local_device_count()
    assert (size(made.params), size(state.adapters) // devices) == (parameters, trained)
    assert metrics["loss"].dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), before)
    assert {x.dtype for x in jax.tree.leaves(made.params)} == {jnp.dtype("bfloat16")}


def test_the_known_architectures_are_what_transformers_reads_from_the_same_keys():
    transformers = pytest.importorskip("transformers")
    for name, raw in KNOWN.items():
        ours = architecture(name)
        theirs = transformers.AutoConfig.for_model(**raw)
        assert (theirs.hidden_size, theirs.num_key_value_heads) == (ours.hidden_size, ours.num_key_value_heads)
        head = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert (head, theirs.rope_parameters["rope_theta"]) == (ours.head_dim, ours.rope.theta)
        assert ours.tie_word_embeddings and theirs.tie_word_embeddings
        assert (ours.rope.kind, ours.rope.factor) == (("llama3", 32.0) if "llama" in name else ("default", 1.0))


def test_a_directory_is_read_and_what_has_no_config_is_refused(tmp_path):
    assert architecture(None) == architecture(str(base_directory()))
    with pytest.raises(InputError, match="config.json cannot be read"):
        architecture(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        architecture(str(tmp_path))
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(InputError, match="is a file but not a .gguf"):
        architecture(str(tmp_path / "weights.bin"))
    with pytest.raises(InputError, match="the hub gave no config.json"):
        architecture("no/such-model")


def test_a_dry_run_says_what_the_step_needs():
    said = []
    loaded = config.load(RunConfig, ROOT / "configs" / "default.yaml", ["batch_size=8", "max_length=32"])
    found = dry_run(loaded, said.append)
    model, params = load_pretrained(base_directory())
    adapters = init_adapters(jax.random.key(0), params, loaded.lora)
    c, body = model.config, params["model"]["layers"]
    kernels = size([body["self_attn"][n]["kernel"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")])
    kernels += size([body["mlp"][n]["kernel"] for n in ("gate_proj", "up_proj", "down_proj")])
    attention = c.num_hidden_layers * 32 * c.num_attention_heads * c.head_dim
    by_hand = 4 * (kernels + c.vocab_size * c.hidden_size) + 6 * size(adapters) + 6 * attention
    assert found["flops_per_token"] == by_hand == flops_of(shapes(loaded))
    # on one device: the base, the adapters with two moments each, and the batch
    batch = 4 * 32 * 4
    least = 4 * (size(params) + 3 * size(adapters)) + batch
    assert least <= found["arguments"] < least + 4096 and found["temporaries"] > 0
    assert found["total"] >= found["arguments"] and any("MiB" in line for line in said)


def test_a_dry_run_chooses_attention_as_the_run_does(monkeypatch):
    """One text a row is one segment; what ``jit`` divides between devices is asked for as such."""
    assert shapes(RunConfig()).model.segments == 1
    packed = RunConfig(data=DataConfig(batching="pack"))
    assert shapes(packed).model.segments == SEGMENTS
    asked = []
    monkeypatch.setattr(
        "stablelora_jax.runs.prepare.best_here", lambda *args, **how: asked.append((args[2:], how)) or "xla"
    )
    mesh = shapes(RunConfig(parallel=MeshConfig(data=8, fsdp=1, tensor=1)))
    assert mesh.model.attention == "xla" and asked == [((mesh.batch.tokens.shape[1], 0), {"partitioned": True})]


def test_the_command_has_it():
    command = [sys.executable, ROOT / "experiments" / "train.py", "--dry-run", "steps=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "steps must be at least 1" in done.stderr
    with pytest.raises(InputError, match="a batch of 7 rows does not divide over 8 devices"):
        dry_run(RunConfig(batch_size=7))
    with pytest.raises(InputError, match="max_length 100000 is more than"):
        dry_run(RunConfig(max_length=100_000))
    with pytest.raises(InputError, match="splash attention needs a tpu, and here is a cpu: choose auto"):
        dry_run(RunConfig(model=ModelConfig(attention="splash")))
