"""Ways to spoil a file: each gives a function of the folder that the file lies in."""

import json
import os
import random
import struct

import numpy as np
from safetensors.numpy import load_file, save_file

GGUF_TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
}


def put(file, content):
    """Replace a file by ``content``: bytes, text, or a value for JSON."""
    raw = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else None
    return lambda place: (place / file).write_bytes(json.dumps(content).encode() if raw is None else raw)


def key(file, name, value):
    """Set a key of a JSON file; ``...`` removes it."""

    def damage(place):
        raw = json.loads((place / file).read_text())
        raw = {**raw, name: value}
        (place / file).write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))

    return damage


def folder(file):
    """A folder where the file was."""
    return lambda place: ((place / file).unlink(), (place / file).mkdir())


def loop(file):
    """A link to itself where the file was."""
    return lambda place: ((place / file).unlink(), os.symlink(file, place / file))


def unreadable(file):
    """A link to a file that no one can read from its start."""
    return lambda place: ((place / file).unlink(), os.symlink("/proc/self/mem", place / file))


def gone(file):
    return lambda place: (place / file).unlink()


def cut(file, share):
    """Keep a share of the bytes, all but the last if it is 1."""

    def damage(place):
        raw = (place / file).read_bytes()
        (place / file).write_bytes(raw[: min(int(share * len(raw)), len(raw) - 1)])

    return damage


def flip(file, seed, header):
    """Change one byte of the header, or of its first ``header`` bytes."""

    def damage(place):
        raw, rng = bytearray((place / file).read_bytes()), random.Random(seed)
        end = header or 8 + struct.unpack("<Q", raw[:8])[0]
        raw[rng.randrange(end)] ^= 1 << rng.randrange(8)
        (place / file).write_bytes(raw)

    return damage


JUNK = (
    None, True, False, 0, -1, 3, 2**31, 2**63, 2**70, 10**400, 0.5, -1e300, float("nan"), float("inf"), "", "x", "\0",
    "(", "é" * 300,
    [], {}, [None], [[]], {"": None}, {"a": 1}, [1, 2, 3], ["q_proj"], "../..", "/",
)  # fmt: skip


def junk(file, seed):
    """Replace a random node of a JSON file by something else, rename its key, or remove it."""

    def damage(place):
        raw, rng = json.loads((place / file).read_text()), random.Random(seed)
        node = raw
        while True:
            at = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[at], dict | list) and node[at] and rng.random() < 0.7:
                node = node[at]
                continue
            break
        kept = node.pop(at)
        if isinstance(node, dict) and rng.random() < 0.2:
            node[rng.choice(("", "x", "model_type", "r"))] = kept
        elif rng.random() < 0.8:
            put_at(node, at, rng.choice(JUNK))
        (place / file).write_text(json.dumps(raw))

    return damage


def put_at(node, at, new):
    node.insert(at, new) if isinstance(node, list) else node.update({at: new})


def tensors(file, change):
    """Rewrite a safetensors file after ``change`` of its dict of arrays."""

    def damage(place):
        loaded = load_file(place / file)
        change(loaded)
        save_file(loaded, place / file)

    return damage


def entry(file, tensor, **values):
    """Change what the header of a safetensors file says of one tensor."""

    def damage(place):
        raw = (place / file).read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        header[tensor] |= values
        put(file, framed(json.dumps(header).encode(), raw[8 + size :]))(place)

    return damage


def framed(header, data=b"", size=None):
    """A safetensors file by its parts."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def eight_bits(file, tensor, dtype):
    """A tensor of the right shape in a float format of eight bits, as quantized models have them."""
    return lambda place: (tensors(file, recast(tensor, np.int8))(place), entry(file, tensor, dtype=dtype)(place))


def gguf(keys=None, change=lambda tensors: None, raw=None):
    """Write the GGUF file again with other metadata or tensors."""

    def damage(place):
        from tests.models.gguf_files import hf_tensors, write

        tensors = hf_tensors()
        change(tensors)
        write(place / "m.gguf", tensors, keys={**GGUF_TOKENIZER, **(keys or {})}, raw=raw)

    return damage


def gguf_array(kind, count):
    """A GGUF file of a gigabyte, almost all of it a hole, whose header promises an array of so many values."""

    def damage(place):
        header = b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, kind, count)
        put("m.gguf", header)(place)
        os.truncate(place / "m.gguf", 2**30)

    return damage


def value(array_value, name):
    def change(loaded):
        loaded[name] = loaded[name].copy()
        loaded[name].flat[0] = array_value

    return change


def renamed(old, new):
    return lambda loaded: loaded.update({new: loaded.pop(old)})


def recast(name, dtype):
    return lambda loaded: loaded.update({name: loaded[name].astype(dtype)})


def turned(name):
    return lambda loaded: loaded.update({name: np.ascontiguousarray(loaded[name].T)})


def reshaped(name, *shape):
    return lambda loaded: loaded.update({name: loaded[name].reshape(shape)})
