"""A GGUF file as if it were a Hugging Face checkpoint: configuration, tensors on demand, tokenizer. No PyTorch.

Llama (which Mistral is in GGUF), Qwen2 and Qwen3. Meaning and defaults of the metadata are those of llama.cpp,
``src/llama-model.cpp``; names of tensors and the permutation of q and k are those of its ``convert_hf_to_gguf.py``.
A key or a tensor that would change the model and is not handled is refused by name.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stablelora_jax.models.pretrained.gguf_container import ELSE, Stored, check_data, decode, read_header
from stablelora_jax.models.pretrained.gguf_rope import ROPE_FREQS, llama3_scaling
from stablelora_jax.models.pretrained.gguf_tokenizer import build_tokenizer, special_ids
from stablelora_jax.utils.errors import InputError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
SIZES = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length"}
SIZES |= {"num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count"}
SIZES |= {"max_position_embeddings": "context_length"}
# Other keys of the architecture: read below; without effect on the model; without effect at this value only.
READ = """attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length attention.value_length
    rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scale_linear""".split()
INERT = "vocab_size tensor_data_layout rope.scaling.finetuned rope.scaling.original_context_length".split()
NEUTRAL = {"attention.causal": True, "attention.sliding_window": 0, "expert_count": 0, "expert_used_count": 0}
NEUTRAL |= {"rope.scaling.attn_factor": 1, "use_parallel_residual": False}

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
MLP = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
BLOCK = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
BLOCK |= {name: f"self_attn.{module}" for name, module in ATTENTION.items()}
BLOCK |= {name: f"mlp.{module}" for name, module in MLP.items()}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}  # of Qwen3 alone


class GgufCheckpoint(NamedTuple):
    """What a GGUF file holds, in Hugging Face's names and layout."""

    config: dict[str, Any]  # what config.json would say
    shapes: dict[str, tuple[int, ...]]  # tensor name -> shape, (out, in) for linears
    read: Callable[[str], np.ndarray]  # tensor name -> float32 array, decoded at each call
    tokenizer: Any | None  # PreTrainedTokenizerFast, or None where the file carries none


def read_gguf(path: str | Path) -> GgufCheckpoint:
    """Open a GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model.

    Raises:
      InputError: no such file, not a whole GGUF file, or another model; one line names file and cause.
    """
    try:
        return _open(Path(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a .gguf file") from None


def _open(path: Path) -> GgufCheckpoint:
    with open(path, "rb") as handle:
        if not path.stat().st_size:
            raise InputError("the file is empty; download it again")
        file = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        metadata, table = read_header(file)
    except (EOFError, UnicodeDecodeError):
        raise InputError("the header ends early or is damaged; download the file again") from None
    config = _config(metadata, table)
    factors = table.pop(ROPE_FREQS, None) if config["model_type"] == "llama" else None
    stored = {_hf_name(name, config): tensor for name, tensor in table.items()}
    check_data(table | ({ROPE_FREQS: factors} if factors else {}), len(file))
    if factors:
        config["rope_scaling"] = llama3_scaling(decode(file, factors), config)

    def read(name: str) -> np.ndarray:
        if name not in stored:
            raise InputError(f"{path}: there is no tensor {name!r}; the names are the keys of shapes")
        array = decode(file, stored[name])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return _unpermute(array, config[heads]) if heads and config["model_type"] == "llama" else array

    shapes = {name: tensor.shape for name, tensor in stored.items()}
    return GgufCheckpoint(config, shapes, read, build_tokenizer(metadata, config["vocab_size"]))


def _config(metadata: Mapping[str, Any], table: Mapping[str, Stored]) -> dict[str, Any]:
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"general.architecture {arch!r:.60} is not supported ({known} are); {ELSE}")
    _refuse_unknown(metadata, arch)
    if "token_embd.weight" not in table:
        raise InputError("the tensor 'token_embd.weight' is missing; convert the model again")
    config = {"model_type": arch, "hidden_act": "silu", "vocab_size": table["token_embd.weight"].shape[0]}
    config |= {name: _number(metadata, f"{arch}.{key}", int) for name, key in SIZES.items()}
    kv_heads = _number(metadata, f"{arch}.attention.head_count_kv", int, config["num_attention_heads"])
    epsilon = _number(metadata, f"{arch}.attention.layer_norm_rms_epsilon")
    biased = {name.split(".")[-2] for name in table if name.endswith(".bias")}
    if arch != "qwen2":  # which always has biases, of q, k and v
        config["attention_bias"] = not biased.isdisjoint(ATTENTION)
    if arch == "llama":
        config["mlp_bias"] = not biased.isdisjoint(MLP)
    return config | {
        "num_key_value_heads": kv_heads,
        "head_dim": _head_dim(metadata, arch, config),
        "rms_norm_eps": float(str(np.float32(epsilon))),  # 1e-05, not the float32 nearest to it
        "rope_theta": _number(metadata, f"{arch}.rope.freq_base", default=10000.0),
        "rope_scaling": _rope_scaling(metadata, arch),
        "tie_word_embeddings": "output.weight" not in table,
        **_token_ids(metadata),
    }


def _number(metadata: Mapping[str, Any], key: str, kind: Any = (int, float), default: Any = None) -> Any:
    value = metadata.get(key, default)
    if value is None:
        raise InputError(f"the key {key!r} is missing; convert the model again with llama.cpp's convert_hf_to_gguf.py")
    if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
        raise InputError(f"{key!r} = {value!r:.60} is not one positive number; {ELSE}")
    return value


def _refuse_unknown(metadata: Mapping[str, Any], arch: str) -> None:
    if metadata.get("general.type", "model") != "model":
        raise InputError(f"general.type is {metadata['general.type']!r:.60}, not 'model'; give the file of the model")
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError("one shard of several (split.count); join them with llama.cpp's llama-gguf-split --merge")
    for key, value in metadata.items():
        name = key.removeprefix(f"{arch}.")
        known = name == key or name in (*SIZES.values(), *READ, *INERT)
        if not known and not (name in NEUTRAL and value == NEUTRAL[name]):
            raise InputError(f"{key!r} = {value!r:.60} is a feature that is not handled; {ELSE}")


def _head_dim(metadata: Mapping[str, Any], arch: str, config: Mapping[str, Any]) -> int:
    """The size of a head, after checking that keys and values have the same and that the whole of it is rotated."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    head_dim: int = _number(metadata, f"{arch}.attention.key_length", int, usual)
    for name in ("attention.value_length", "rope.dimension_count"):
        value = metadata.get(f"{arch}.{name}", head_dim)
        if value != head_dim:
            raise InputError(f"'{arch}.{name}' = {value!r:.60} is not the head dimension {head_dim}; {ELSE}")
    return head_dim


def _rope_scaling(metadata: Mapping[str, Any], arch: str) -> dict[str, Any] | None:
    kind = metadata.get(f"{arch}.rope.scaling.type", "linear")  # llama.cpp's default, with factor 1
    if kind not in ("none", "linear"):
        raise InputError(f"'{arch}.rope.scaling.type' {kind!r:.60} is not supported (none and linear are); {ELSE}")
    factor = _number(metadata, f"{arch}.rope.scale_linear", default=1.0)  # the old name
    factor = _number(metadata, f"{arch}.rope.scaling.factor", default=factor)
    return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens; a text also ends where a turn or a message ends."""
    ids = special_ids(metadata)
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    eos = ends if len(ends) > 1 else ids["eos"]
    return {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["pad"]}


def _hf_name(name: str, config: Mapping[str, Any]) -> str:
    layers, block = config["num_hidden_layers"], BLOCK | (QK_NORM if config["model_type"] == "qwen3" else {})
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    module = match and (block if match[1] else TOP).get(match[2])
    if not match or not module or int(match[1] or 0) >= layers:
        raise InputError(f"the tensor {name!r} is not part of a model of {layers} layers that is read here; {ELSE}")
    return f"model.layers.{match[1]}.{module}.{match[3]}" if match[1] else f"{module}.{match[3]}"


def gguf_name(module: str) -> str | None:
    """llama.cpp's name for the weight of a module that Hugging Face calls ``module``; None where it has none.

    ``gguf_name("model.layers.3.self_attn.q_proj") == "blk.3.attn_q.weight"``.
    """
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    table, own = (BLOCK | QK_NORM, match[2]) if match else (TOP, module)
    found = next((name for name, hf in table.items() if hf == own), None)
    return found and (f"blk.{match[1]}.{found}.weight" if match else f"{found}.weight")


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k (heads * head_dim, ...) in the order of llama.cpp's ``llama``: halves of a head alternate."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of :func:`permute`."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
