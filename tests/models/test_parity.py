"""Logits against ``transformers`` in PyTorch, float32: random tiny configurations, each feature in both states."""

import itertools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from stablelora_jax import load_pretrained  # noqa: E402

TEXT = "Tom and the grey cat went down to the river. They saw 12 boats, and one of them was red."
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 500.0,
    },
}
GRID = [
    (kind, tied, bias, kv, head_dim, rope)
    for kind, tied, bias, kv, head_dim, rope in itertools.product(
        ("llama", "qwen2"), (False, True), (False, True), (1, 2, 4), (None, 12), ROPES
    )
    if not (kind == "qwen2" and bias)  # Qwen2's biases are not a choice
]


def build(directory, kind, tied, bias, kv, head_dim, rope, old_style=False):
    """A random model of ``transformers``, saved to ``directory``, with every bias and norm random."""
    cls = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
    extra = {"attention_bias": bias, "mlp_bias": bias} if kind == "llama" else {}
    config = cls(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters=dict(ROPES[rope]),
        **extra,
        **({"head_dim": head_dim} if head_dim else {}),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    if old_style:
        raw = json.loads((directory / "config.json").read_text())
        rope_parameters = raw.pop("rope_parameters")
        raw["rope_theta"] = rope_parameters.pop("rope_theta")
        raw["rope_scaling"] = (
            None if rope == "default" else {**rope_parameters, "type": rope_parameters.pop("rope_type")}
        )
        (directory / "config.json").write_text(json.dumps(raw))
    return model


def assert_same_logits(model, directory, tokens):
    ours, params = load_pretrained(directory)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(ours.apply({"params": params}, tokens))
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    return ours


@pytest.mark.parametrize("case", GRID, ids=lambda c: "-".join(map(str, c)))
def test_random_tiny_models(case, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 61, (2, 40))
    ours = assert_same_logits(build(tmp_path, *case), tmp_path, tokens)
    assert ours.config.head_dim == (case[4] or 8) and ours.config.num_key_value_heads == case[3]


@pytest.mark.parametrize("rope", ROPES)
def test_the_old_style_of_config(rope, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 61, (2, 40))
    assert_same_logits(build(tmp_path, "llama", True, False, 2, None, rope, old_style=True), tmp_path, tokens)


def test_sharded_checkpoint(tmp_path):
    model = build(tmp_path / "whole", "qwen2", False, False, 2, None, "default")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same_logits(model, tmp_path / "shards", np.arange(30)[None])


@pytest.mark.parametrize("name", ["stories260K", "stories260K-as-qwen2"])
def test_stories260k_on_real_text(name, shared):
    directory = shared(f"models/{name}")
    model, _ = load_pretrained(directory)
    ids = transformers.PreTrainedTokenizerFast.from_pretrained(directory)(TEXT).input_ids
    assert model.tokenizer(TEXT).input_ids == ids
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert_same_logits(reference, directory, np.array([ids]))


def test_smollm2_from_gguf_on_real_text(smollm2):
    model, params = load_pretrained(smollm2)
    tokens = np.array([model.tokenizer(TEXT).input_ids])
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(model.apply({"params": params}, tokens))
    assert np.abs(logits - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
