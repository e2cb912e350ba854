"""A decoder's architecture: ``config.json`` of the Llama, Mistral, Qwen2 and Qwen3 families as one frozen dataclass.

Reads the old style (``rope_theta``, ``rope_scaling``, ``max_window_layers``) and the style of transformers 5
(``rope_parameters``, ``layer_types``). A key that changes the forward pass and is neither handled here nor at its
neutral value is refused by name: a model that differs silently from the one its authors trained is worse than none.
Sources of the meanings and defaults: ``transformers/models/{llama,mistral,qwen2,qwen3}/configuration_*.py`` and
``transformers/modeling_rope_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from stablelora_jax.models.pretrained.fields import flag, number, size, token_ids
from stablelora_jax.models.windows import KEYS as WINDOW_KEYS
from stablelora_jax.models.windows import read_windows, window_keys
from stablelora_jax.utils.errors import InputError


class Family(NamedTuple):
    """Defaults of *absent* keys in one ``model_type``, and its bias keys; None: follows from the sizes."""

    architecture: str
    num_key_value_heads: int | None
    head_dim: int | None
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int | None
    biases: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", None, None, 2048, 1, 2, ("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", 8, None, 131072, 1, 2),
    "qwen2": Family("Qwen2ForCausalLM", 32, None, 32768, None, None),
    "qwen3": Family("Qwen3ForCausalLM", 32, 128, 32768, None, None, ("attention_bias",)),
}
MOST_LAYERS, WIDEST_HEAD = 10_000, 2**16
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Keys that leave the logits alone: names, training-time settings, token ids, file bookkeeping.
INERT = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path use_cache
    initializer_range max_position_embeddings bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id attn_implementation _attn_implementation tokenizer_class task_specific_params id2label
    label2id problem_type chunk_size_feed_forward output_attentions output_hidden_states return_dict torchscript
    is_decoder is_encoder_decoder base_model_tp_plan base_model_pp_plan keys_to_ignore_at_inference unsloth_version
    unsloth_fixed rope_scaling rope_theta rope_parameters auto_map transformers.js_config head_dim
    num_key_value_heads rms_norm_eps tie_word_embeddings attention_dropout max_length max_new_tokens min_length
    temperature top_p top_k do_sample num_beams repetition_penalty model_max_length max_sequence_length""".split()
) | set(SIZES)
# Keys that must have one of these values; every other unknown key must be off (None, False, 0, empty).
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (None, 1),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "is_causal": (None, True),
}
ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: ``kind`` is ``default``, ``linear`` or ``llama3`` (which uses the last three)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: float = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture of one decoder; field names are Hugging Face's."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()  # of each layer: keys per token, itself included; 0 and (): no limit
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()


def decoder_config(raw: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """Read the content of a ``config.json``; ``source`` names the file in errors.

    Raises:
      InputError: an unknown model type, a missing or absurd size, or a feature that this decoder does not have.
    """
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise InputError(f"{source}: model_type {model_type!r:.60} is not supported; supported: {', '.join(FAMILIES)}")
    _refuse_unknown(raw, source)
    sizes = {name: size(raw, name, source) for name in SIZES}
    layers = size(raw, "num_hidden_layers", source, most=MOST_LAYERS)
    biased = flag(raw, "attention_bias", source)
    return DecoderConfig(
        model_type=str(model_type),
        **sizes,
        **_heads(raw, source, family, sizes["hidden_size"], sizes["num_attention_heads"]),
        rms_norm_eps=number(raw, "rms_norm_eps", source, default=1e-6),
        rope=_rope(raw, source),
        tie_word_embeddings=flag(raw, "tie_word_embeddings", source),
        qkv_bias=model_type == "qwen2" or biased,
        o_bias=biased,
        mlp_bias=flag(raw, "mlp_bias", source),
        qk_norm=model_type == "qwen3",
        windows=read_windows(raw, source, layers),
        max_position_embeddings=size(
            raw, "max_position_embeddings", source, default=family.max_position_embeddings, most=2**31 - 1
        ),
        bos_token_id=next(iter(token_ids(raw, "bos_token_id", source, family.bos_token_id)), None),
        eos_token_id=token_ids(raw, "eos_token_id", source, family.eos_token_id),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The content of a ``config.json`` (transformers 5 style) that describes ``config``."""
    rope = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    rope |= {key: getattr(config.rope, key) for key in ROPE_KEYS[config.rope.kind]}
    family = FAMILIES[config.model_type]
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    same = SIZES + ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in same},
        **{name: biases[name] for name in family.biases},
        **window_keys(config.model_type, config.windows),
        "hidden_act": "silu",
        "rope_parameters": rope,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id) or None,
    }


def _heads(raw: Mapping[str, Any], source: str, family: Family, hidden: int, heads: int) -> dict[str, int]:
    kv_heads = size(
        {"num_key_value_heads": family.num_key_value_heads, **raw}, "num_key_value_heads", source, default=heads
    )
    if heads % kv_heads:
        raise InputError(f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    given = {"head_dim": family.head_dim, **raw}
    if given["head_dim"] is None and hidden % heads:
        raise InputError(f"{source}: hidden_size {hidden} is not a multiple of {heads} attention heads")
    usual = hidden // heads if family.head_dim is None else None
    head_dim = size(given, "head_dim", source, default=usual, most=WIDEST_HEAD)
    if head_dim % 2:
        raise InputError(f"{source}: head_dim {head_dim} is odd, but rotary embedding rotates pairs of dimensions")
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def _refuse_unknown(raw: Mapping[str, Any], source: str) -> None:
    known = INERT | set(FAMILIES[raw["model_type"]].biases) | {"layer_types", "max_window_layers"}
    known |= set(WINDOW_KEYS) if raw["model_type"] != "llama" else set()
    for key, value in raw.items():
        if key in known or (key in NEUTRAL and value in NEUTRAL[key]) or (key not in NEUTRAL and not value):
            continue
        raise InputError(f"{source}: {key} = {value!r:.60} is a feature that this decoder does not have")


def _rope(raw: Mapping[str, Any], source: str) -> Rope:
    if raw.get("rope_parameters") and raw.get("rope_scaling"):
        raise InputError(f"{source}: both rope_parameters and rope_scaling are given; keep one")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{source}: rope parameters must be a mapping, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise InputError(f"{source}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}")
    known = {"rope_type", "type", "rope_theta", *ROPE_KEYS[kind]}
    for key, value in rope.items():
        neutral = value is None or (key == "partial_rotary_factor" and value == 1)
        if key not in known and not neutral:
            raise InputError(f"{source}: rope parameter {key} = {value!r} has no meaning for rope type {kind!r}")
    missing = [key for key in ROPE_KEYS[kind] if key not in rope]
    if missing:
        raise InputError(f"{source}: rope type {kind!r} needs {', '.join(missing)}")
    values = {key: number(rope, key, source, default=1.0) for key in ROPE_KEYS[kind]}
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise InputError(f"{source}: low_freq_factor must be less than high_freq_factor")
    owner = rope if rope.get("rope_theta") is not None else raw
    theta = 10000.0 if owner.get("rope_theta") is None else number(owner, "rope_theta", source, default=10000.0)
    return Rope(theta=theta, kind=kind, **values)
