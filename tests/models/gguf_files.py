"""Tiny GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import gguf
import gguf.quants as quants
import numpy as np

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 96, 32, 64, 2, 4, 2, 8
F32, F16, BF16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))
SIZES = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5e5,
}


def matrices(head_dim=HEAD_DIM):
    q, kv = HEADS * head_dim, KV_HEADS * head_dim
    attention = {"q": (q, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, q)}
    mlp = {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
    return {f"self_attn.{n}_proj": s for n, s in attention.items()} | {f"mlp.{n}_proj": s for n, s in mlp.items()}


def hf_tensors(tied=True, biases=(), head_dim=HEAD_DIM, qk_norm=False):
    """A random model under Hugging Face's names; ``biases`` are the modules that have one, ``qk_norm`` is Qwen3's."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {} if tied else {"lm_head.weight": (VOCAB, HIDDEN)}
    for n in range(LAYERS):
        layer = f"model.layers.{n}."
        shapes |= {f"{layer}{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{n}_norm.weight": (head_dim,) for n in "qk" if qk_norm}
        for name, shape in matrices(head_dim).items():
            shapes[f"{layer}{name}.weight"] = shape
            if name in biases:
                shapes[f"{layer}{name}.bias"] = shape[:1]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name):
    table = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    table |= {"model.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    table |= {f"self_attn.{hf}_proj": f"attn_{own}" for hf, own in zip("qkvo", ("q", "k", "v", "output"), strict=True)}
    table |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    table |= {f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"}
    for hf, own in table.items():
        name = name.replace(hf, own)
    return name


def llama_cpp_order(array, heads):
    """Row ``half * d/2 + i`` of a head goes to row ``2 i + half``: llama.cpp rotates neighbours, not halves."""
    out, dim = np.empty_like(array), array.shape[0] // heads
    for row in range(array.shape[0]):
        head, half, i = row // dim, row % dim // (dim // 2), row % (dim // 2)
        out[head * dim + 2 * i + half] = array[row]
    return out


def write(path, tensors, arch="llama", kind=F32, keys=None, raw=None):
    """Write ``tensors`` as llama.cpp's converter does; ``keys`` adds metadata (None removes), ``raw`` adds tensors."""
    writer = gguf.GGUFWriter(path, arch)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    metadata = {f"{arch}.{name}": value for name, value in SIZES.items()} | (keys or {})
    for key, value in metadata.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    for name, array in tensors.items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            array = llama_cpp_order(array, HEADS if "q_proj" in name else KV_HEADS)
        if array.ndim == 2 and kind not in (F32, F16):
            writer.add_tensor(gguf_name(name), quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array.astype(np.float16) if (array.ndim, kind) == (2, F16) else array)
    for name, array in (raw or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
