"""Logits and gradients against ``transformers`` and ``peft`` in PyTorch, float32: each feature in both states."""

import itertools
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from stablelora_jax import LoraSpec, adapted, init_adapters, load_pretrained, save_peft, save_pretrained  # noqa: E402
from tests.helpers import jit, trained  # noqa: E402

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
BIASES = {"llama": (False, True), "mistral": (False,), "qwen2": (False,), "qwen3": (False, True)}
SHAPES = [(1, 12, "linear"), (2, None, "llama3"), (4, 12, "default")]
GRID = [
    (kind, tied, bias, *shape)
    for kind, biases in BIASES.items()
    for (tied, bias), shape in itertools.product(itertools.product((False, True), biases), SHAPES)
]
FULL, SLIDING = "full_attention", "sliding_attention"
ON = {"use_sliding_window": True, "sliding_window": 5}
WINDOWS = {
    "mistral": ("mistral", {"sliding_window": 5}, (5, 5)),
    "mistral-null": ("mistral", {"sliding_window": None}, ()),
    "mistral-default": ("mistral", {}, (4096, 4096)),
    "qwen2-off": ("qwen2", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}, ()),
    "qwen2-all": ("qwen2", {**ON, "max_window_layers": 0}, (5, 5)),
    "qwen2-late": ("qwen2", {**ON, "max_window_layers": 1}, (0, 5)),
    "qwen2-beyond": ("qwen2", {**ON, "max_window_layers": 2}, ()),
    "qwen2-null": ("qwen2", {**ON, "sliding_window": None, "max_window_layers": 0}, ()),
    "qwen2-typed": ("qwen2", {**ON, "layer_types": [SLIDING, FULL], "max_window_layers": 0}, (5, 0)),
    "qwen3-all": ("qwen3", {**ON, "max_window_layers": 0}, (5, 5)),
    "qwen3-late": ("qwen3", {**ON, "max_window_layers": 1}, (0, 5)),
    "qwen3-typed": ("qwen3", {**ON, "layer_types": [FULL, FULL]}, ()),
}
CLASSES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}


def build(directory, kind, tied, bias, kv, head_dim, rope, old_style=False, **keys):
    """A random model of ``transformers``, saved to ``directory``, with every bias and norm random."""
    extra = {"llama": {"attention_bias": bias, "mlp_bias": bias}, "qwen3": {"attention_bias": bias}}.get(kind, {})
    config = getattr(transformers, CLASSES[kind])(
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
        **keys,
        **({"head_dim": head_dim or 8} if head_dim or kind == "qwen3" else {}),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    if old_style:
        as_before_transformers_5(directory / "config.json", rope, keys)
    return model


def as_before_transformers_5(path, rope, keys):
    """Rewrite a ``config.json``: rope in two keys, no ``layer_types``, and the window as it was given."""
    raw = json.loads(path.read_text()) | {k: v for k, v in keys.items() if k != "layer_types"}
    rope_parameters = raw.pop("rope_parameters")
    raw["rope_theta"] = rope_parameters.pop("rope_theta")
    raw["rope_scaling"] = None if rope == "default" else {**rope_parameters, "type": rope_parameters.pop("rope_type")}
    if "layer_types" not in keys:
        raw.pop("layer_types", None)
    path.write_text(json.dumps(raw))


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


@pytest.mark.parametrize("old_style", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("case", WINDOWS)
def test_sliding_windows(case, old_style, tmp_path):
    """The same logits, the same windows read, and the same model when written again and read by transformers."""
    kind, keys, windows = WINDOWS[case]
    tokens = np.random.default_rng(0).integers(0, 61, (2, 40))
    theirs = build(tmp_path / "a", kind, False, False, 2, None, "default", old_style, **keys)
    ours = assert_same_logits(theirs, tmp_path / "a", tokens)
    assert ours.config.windows == windows
    save_pretrained(tmp_path / "b", *load_pretrained(tmp_path / "a"))
    assert load_pretrained(tmp_path / "b")[0].config == ours.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(again(torch.tensor(tokens)).logits, theirs(torch.tensor(tokens)).logits)


GRADIENTS = [
    ("llama", False, False, {}),
    ("llama", True, True, {}),
    ("mistral", False, False, {"sliding_window": 5}),
    ("mistral", True, False, {"sliding_window": None}),
    ("qwen2", False, False, {**ON, "max_window_layers": 1}),
    ("qwen2", True, False, {}),
    ("qwen3", False, True, {}),
    ("qwen3", True, False, {**ON, "max_window_layers": 1}),
]


def assert_same_gradients(theirs, path, tokens, tmp_path, size):
    """Our adapters of the base at ``path``, saved for ``peft``, give its logits and its gradients of one scalar."""
    peft = pytest.importorskip("peft")
    base, params = load_pretrained(path)
    spec = LoraSpec(target_modules="all-linear", rank=3, alpha=5)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec, size=size)
    save_peft(tmp_path / "adapter", adapters, spec, base_model=str(path), params=params)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).eval()
    weights = np.random.default_rng(1).normal(size=(*tokens.shape, base.config.vocab_size)).astype(np.float32)
    expected = theirs(torch.tensor(tokens)).logits
    (expected * torch.tensor(weights)).sum().backward()

    def cost(adapters, params):
        logits = adapted(base, spec).apply({"params": params, "lora": adapters}, tokens)
        return (logits * weights).sum(), logits

    gradients, logits = jit(jax.grad(cost, has_aux=True))(adapters, params)
    expected = expected.detach().numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    checked = 0
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            *_, layer, part, module, factor, _, _ = name.split(".")
            ours = gradients["model"]["layers"][part][module][factor.lower()][int(layer)].T
            assert np.abs(ours - parameter.grad.numpy()).max() <= 1e-4 * max(1, parameter.grad.abs().max().item())
            assert np.abs(ours).max() > 1e-3
            checked += 1
    assert checked == 2 * 7 * base.config.num_hidden_layers


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda c: "-".join(map(str, c[:3])))
def test_gradients_of_adapters(case, tmp_path):
    kind, tied, bias, keys = case
    theirs = build(tmp_path / "base", kind, tied, bias, 2, 12, "llama3", **keys)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 24))
    assert_same_gradients(theirs, tmp_path / "base", tokens, tmp_path, size=0.1)


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
def test_stories260k_on_real_text(name, shared, tmp_path):
    directory = shared(f"models/{name}")
    model, _ = load_pretrained(directory)
    ids = transformers.PreTrainedTokenizerFast.from_pretrained(directory)(TEXT).input_ids
    assert model.tokenizer(TEXT).input_ids == ids
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert_same_logits(reference, directory, np.array([ids]))
    assert_same_gradients(reference, directory, np.array([ids]), tmp_path, size=0.05)


def test_smollm2_from_gguf_on_real_text(smollm2, tmp_path):
    model, _ = load_pretrained(smollm2)
    tokens = np.array([model.tokenizer(TEXT).input_ids])
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    assert_same_logits(reference, smollm2, tokens)
    assert_same_gradients(reference, smollm2, tokens, tmp_path, size=0.01)
