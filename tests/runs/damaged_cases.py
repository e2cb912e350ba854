"""Damages that must be noticed, as tables, and those that may be harmless."""

from functools import partial

import numpy as np

from tests.runs.damage import (
    cut,
    eight_bits,
    entry,
    flip,
    folder,
    framed,
    gguf,
    gguf_array,
    gone,
    junk,
    key,
    loop,
    put,
    recast,
    renamed,
    reshaped,
    tensors,
    turned,
    unreadable,
    value,
)

MODEL, ADAPTER, INDEX = "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"
Q, DOWN, EMBEDDING = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.embed_tokens.weight",
)
A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

NESTED = "[" * 100_000 + "]" * 100_000
NO_OBJECTS = {
    "empty": b"", "blank": b" \n", "list": [], "text": "\"x\"", "number": 3, "null": None, "true": True,
    "half": "{\"a\": ",
    "comment": "{} // so", "single quotes": "{'a': 1}", "nested": NESTED, "nested in a key": '{"x": ' + NESTED + "}",
    "nested maps": '{"a":' * 100_000, "utf-16": '{"model_type": "llama"}'.encode("utf-16"), "latin-1": b'{"a": "\xe9"}',
    "bytes": bytes(range(256)), "zeros": bytes(1000), "huge number": "{\"x\": " + "9" * 5000 + "}",
    "control": "{\"a\nb\": \"\n\"}",
}  # fmt: skip
HEADERS = {
    "empty": b"", "four bytes": b"\0\0\0\0", "no header": framed(b""), "length 2**63": framed(b"{}", size=2**63),
    "length 2**64-1": framed(b"{}", size=2**64 - 1), "length 2**40": framed(b"{}", size=2**40),
    "not JSON": framed(b"{,}"),
    "list": framed(b"[]"), "nested": framed(NESTED.encode()), "nested maps": framed(b'{"a":' * 100_000),
    "not UTF-8": framed(b'{"\xff": 1}'), "no tensors": framed(b"{}"), "pickle": b"\x80\x04\x95" + bytes(100),
    "gguf": b"GGUF" + bytes(100), "number": framed(b'{"a": 3}'), "no dtype": framed(b'{"a": {"shape": []}}'),
}  # fmt: skip
FIELDS = {
    "2**60 elements": {"shape": [2**30, 2**30]}, "2**70 elements": {"shape": [2**35, 2**35]},
    "negative": {"shape": [-1, 16]},
    "negative offset": {"data_offsets": [-8, 8]}, "huge offset": {"data_offsets": [2**62, 2**62 + 8]},
    "offsets reversed": {"data_offsets": [1024, 0]}, "one offset": {"data_offsets": [0]},
    "overlap": {"data_offsets": [0, 1024]},
    "shape of text": {"shape": "16"}, "shape of halves": {"shape": [0.5, 4]}, "no such dtype": {"dtype": "F31"},
    "dtype of a number": {"dtype": 3}, "half the size": {"dtype": "F16"}, "no dtype": {"dtype": None},
}  # fmt: skip


def arrays(tensor, other):
    """Damages to the tensors of a safetensors file whose header stays right."""
    return {
        "NaN": value(np.nan, tensor), "infinity": value(np.inf, tensor), "-infinity": value(-np.inf, tensor),
        "renamed": renamed(tensor, tensor.replace("q_proj", "query")), "missing": lambda loaded: loaded.pop(tensor),
        "extra": lambda loaded: loaded.update(extra=np.ones(3, np.float32)), "prefix": renamed(tensor, f"x.{tensor}"),
        "one layer more": lambda loaded: loaded.update({tensor.replace(".1.", ".9."): loaded[tensor]}),
        "all missing": lambda loaded: loaded.clear(), "transposed": turned(other), "flat": reshaped(tensor, -1),
        "an axis more": reshaped(tensor, 1, *(-1, 16)), "int32": recast(tensor, np.int32),
        "int8": recast(tensor, np.int8),
        "bool": recast(tensor, np.bool_), "uint64": recast(tensor, np.uint64), "complex": recast(tensor, np.complex64),
        "empty tensor": lambda loaded: loaded.update({tensor: np.zeros((0, 16), np.float32)}),
        "scalar": lambda loaded: loaded.update({tensor: np.array(1, np.float32)}),
        "too large for float32": lambda loaded: loaded.update({tensor: loaded[tensor].astype(np.float64) * 1e300}),
    }  # fmt: skip


SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
WRONG = ["16", -1, 0, 2**60, 2**31, 1.5, True, [16], {}]
CONFIG = {
    "model_type": [..., None, 3, [], {}, "gpt2", "", "Llama"],
    "head_dim": [3, -2, 2**40, "4", [4]],
    "rms_norm_eps": ["1e-5", -1, 0, float("nan"), float("inf"), [1e-5], True, 10**400],
    "tie_word_embeddings": ["yes", 2, [], {}],
    "attention_bias": ["no", 1.5, [True]],
    "hidden_act": ["gelu", 3, ["silu"]],
    "rope_parameters": [
        3,
        [1],
        "default",
        {"rope_type": "yarn"},
        {"rope_type": 3},
        {"rope_type": []},
        {"rope_theta": "x"},
    ],
    "rope_scaling": [{"rope_type": "linear", "factor": 2.0}],
    "max_position_embeddings": [-1, "128", [128], 2**60],
    "bos_token_id": ["1", {}, 1.5],
    "quantization_config": [{"bits": 4}],
    "some_new_feature": [True, "x", 3],
}
ADAPTER_CONFIG = {
    "peft_type": [..., None, 3, [], {}, "IA3", "lora"],
    "r": [..., None, "2", 0, -2, 2.0, True, [2], 3, 2**60],
    "lora_alpha": [..., None, "16", 0, -1, True, [16], float("nan"), float("inf"), 10**400],
    "target_modules": [..., None, 3, [], {}, [3], [None], ["nothing"], "(", [[""]], True, ".*x", "(q_proj)*" * 50],
    "use_rslora": ["x", 3, [1], {"a": 1}],
    "use_dora": [True, "x", 3],
    "lora_dropout": ["x", -0.5, 2, [0.1], float("nan")],
    "rank_pattern": [3, [3], "x", {"q_proj": "x"}, {"q_proj": 0}, {"q_proj": 3}, {"(": 2}, {"q_proj": [2]}],
    "alpha_pattern": [3, "x", {"q_proj": "x"}, {"q_proj": -1}, {"q_proj": None}],
    "layers_to_transform": ["x", [0.5], [None], [9], {"a": 1}, [2**70]],
    "exclude_modules": [3, "(", [3], ["q_proj", "v_proj"]],
    "modules_to_save": [["lm_head"], "x", 3, [3], [["norm"]]],
    "bias": [3, "some", [1], True],
    "fan_in_fan_out": [True],
    "layer_replication": [[[0, 2]]],
    "init_lora_weights": ["corda", 3, [1], {"a": 1}],
    "a_new_feature": [True, "x"],
}  # fmt: skip
MAPS = {
    "no map": {}, "list": {"weight_map": []}, "text": {"weight_map": "x"}, "null": {"weight_map": None},
    "none": {"weight_map": {}},
    "numbers": {"weight_map": {"a": 3}}, "lists": {"weight_map": {"a": [1]}},
    "nulls": {"weight_map": {"a": None, "b": "c"}},
    "absent file": {"weight_map": {"a": "absent.safetensors"}}, "zero byte": {"weight_map": {"a": "\0"}},
    "parent": {"weight_map": {"a": "../hf/model.safetensors"}}, "folder": {"weight_map": {"a": "."}},
    "nothing": {"weight_map": {"a": ""}},
    "long name": {"weight_map": {"a": "x" * 5000}},
}  # fmt: skip


GGUF_KEYS = {
    "llama.block_count": [3, 1, 2**31, 2**32 - 1, 2.0, "2", [2]],
    "llama.embedding_length": [16, 2**31, 2**32 - 1, 2.5],
    "llama.feed_forward_length": [32, 2**32 - 1],
    "llama.attention.head_count": [3, 5, 2**32 - 1],
    "llama.attention.head_count_kv": [3, 4, [2, 2]],
    "llama.attention.key_length": [7, 16, 2**32 - 1],
    "llama.attention.layer_norm_rms_epsilon": [0.0, -1.0, float("nan"), float("inf"), "1e-5"],
    "llama.rope.freq_base": [0.0, -1.0, float("nan"), float("inf")],
    "llama.rope.scaling.factor": [float("nan"), float("inf"), 0.0, "x"],
    "llama.context_length": [2**32 - 1, "x"],
    "general.alignment": [0, 2**31, "x", 2.0],
    "general.type": ["adapter", 3],
    "tokenizer.ggml.model": [3, [1], "bert"],
    "tokenizer.ggml.pre": [3, "llama-bpe"],
    "tokenizer.ggml.tokens": [3, [1, 2], [1.5], "abc", ["a"] * 97, ["a"] * 6],
    "tokenizer.ggml.scores": [3, [1.0], ["a"] * 6, [0.0] * 5 + [float("nan")]],
    "tokenizer.ggml.token_type": [3, [1], ["a"] * 6, [1.5] * 6],
    "tokenizer.ggml.merges": [3, ["a"], ["x y"], [1]],
    "tokenizer.ggml.bos_token_id": [96, "1", 1.5, [1], True],
    "tokenizer.ggml.eos_token_id": [2**31],
    "tokenizer.ggml.add_bos_token": ["x", 3, [True]],
    "tokenizer.ggml.add_space_prefix": ["x", 2],
    "tokenizer.chat_template": [3, [1]],
    "tokenizer.chat_templates": [3, "x", [1], ["absent"]],
}
GGUF_TENSORS = {
    "NaN": gguf(change=value(np.nan, Q)), "infinity": gguf(change=value(np.inf, Q)),
    "missing": gguf(change=lambda t: t.pop(Q)),
    "no embedding": gguf(change=lambda t: t.pop(EMBEDDING)), "transposed": gguf(change=turned(DOWN)),
    "flat": gguf(change=reshaped(DOWN, -1)), "three axes": gguf(change=reshaped(DOWN, 2, 16, 64)),
    "renamed": gguf(change=renamed(Q, "x.weight")),
    "int32": gguf(change=recast(Q, np.int32)), "float64": gguf(change=recast(Q, np.float64)),
    "embedding flat": gguf(change=reshaped(EMBEDDING, -1)),
    "extra": gguf(raw={"blk.0.attn_sinks.weight": np.ones(4, np.float32)}),
    "a layer more": gguf(raw={"blk.2.attn_q.weight": np.ones((32, 32), np.float32)}),
    "rope_freqs": gguf(raw={"rope_freqs.weight": np.full(4, np.nan, np.float32)}),
    "2**29 bytes": gguf_array(0, 2**29), "2**26 texts": gguf_array(8, 2**26), "2**27 numbers": gguf_array(4, 2**27),
    "norm of another size": gguf(change=reshaped("model.norm.weight", 1, -1)),
}  # fmt: skip
JSON = (("hf", "config.json"), ("peft", "adapter_config.json"), ("hf", "tokenizer.json"), ("shards", INDEX))
EXTRAS = (("hf", "generation_config.json"), ("hf", "tokenizer_config.json"))
WEIGHTS = (("hf", MODEL, Q, DOWN), ("peft", ADAPTER, A, A))
FILES = (*JSON[:2], JSON[3], ("hf", MODEL), ("peft", ADAPTER), ("gguf", "m.gguf"))


def must_be_noticed():
    """``(kind, name, damage)`` of every damage that changes what is loaded."""

    def each(kind, file, damages):
        return ((kind, f"{file}: {name}", damage) for name, damage in damages)

    for kind, file in JSON:
        yield from each(kind, file, ((name, put(file, content)) for name, content in NO_OBJECTS.items()))
    for kind, file in EXTRAS:
        yield from each(kind, file, ((name, put(file, NO_OBJECTS[name])) for name in ("empty", "list", "nested")))
    for kind, file, tensor, other in WEIGHTS:
        yield from each(kind, file, ((f"header {name}", put(file, content)) for name, content in HEADERS.items()))
        yield from each(kind, file, ((name, entry(file, tensor, **change)) for name, change in FIELDS.items()))
        yield from each(kind, file, ((name, tensors(file, f)) for name, f in arrays(tensor, other).items()))
        yield from each(kind, file, ((f"cut at {x}", cut(file, x)) for x in (0.001, 0.1, 0.3, 0.6, 0.9, 1)))
        yield from each(
            kind, file, ((f"F8_{x}", eight_bits(file, tensor, f"F8_{x}")) for x in ("E4M3", "E5M2", "E8M0"))
        )
    for kind, file in FILES:
        yield from each(kind, file, ((how.__name__, how(file)) for how in (folder, loop, gone, unreadable)))
    ends = ("2", [1.5], [[2]], {"a": 2}, True)
    yield from each("hf", EXTRAS[0][1], ((f"ends = {x!r}", key(EXTRAS[0][1], "eos_token_id", x)) for x in ends))
    sizes = [(name, wrong) for name in SIZES for wrong in WRONG]
    configs = (("hf", "config.json", sizes + flat(CONFIG)), ("peft", "adapter_config.json", flat(ADAPTER_CONFIG)))
    for kind, file, table in configs:
        yield from each(kind, file, ((f"{name} = {wrong!r:.30}", key(file, name, wrong)) for name, wrong in table))
    yield from each("shards", INDEX, ((name, put(INDEX, content)) for name, content in MAPS.items()))
    yield from each("gguf", "m.gguf", ((f"{k} = {wrong!r:.30}", gguf({k: wrong})) for k, wrong in flat(GGUF_KEYS)))
    yield from each("gguf", "m.gguf", GGUF_TENSORS.items())
    yield from each("gguf", "m.gguf", ((f"cut at {x:.2f}", cut("m.gguf", x)) for x in np.linspace(0.001, 1, 15)))


def flat(table):
    return [(name, wrong) for name, wrongs in table.items() for wrong in wrongs]


def may_be_harmless():
    """``(kind, name, seed -> damage)`` of bytes of headers, and of values of JSON files, changed at random."""
    for kind, file, header in (("hf", MODEL, 0), ("peft", ADAPTER, 0), ("gguf", "m.gguf", 1500)):
        yield kind, f"a byte of {file}", partial(flip, file, header=header)
    for kind, file in (*JSON, *EXTRAS):
        yield kind, f"a value of {file}", partial(junk, file)
