"""Creates the base model that ships with the package: text, tokenizer, pretraining, model directory.

It is deterministic: the same seed, steps, package versions and machine give the same files, byte for byte.

    python experiments/pretrain_base.py --output runs/base

The text comes from ``stablelora_jax/data/tasks/small_world.py``; the model is a Llama small enough for a laptop's CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from stablelora_jax.runs.cli import exit_code
from stablelora_jax.utils.errors import InputError

SPECIAL = BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # ids 0, 1, 2
LENGTH = 128  # tokens per row
BATCH = 8  # rows per step
STEPS = 1800
LEARNING_RATE, WARMUP = 4e-3, 50
TOKENIZER_TEXTS = 5000  # paragraphs that the tokenizer is trained on
HELD_OUT_ROWS = 160
THREADS = (
    "2"  # NPROC: XLA splits sums over this many threads (default: one per core); another number rounds differently
)


def texts(seed: int, *, held_out: bool) -> Iterator[str]:
    """An infinite stream of paragraphs, for training or held out; the checksum of a paragraph decides which."""
    from stablelora_jax.data.tasks.small_world import paragraphs

    stream = paragraphs(f"{'held out' if held_out else 'train'} {seed}")
    return (text for text in stream if (crc32(text.encode()) % 10 == 0) == held_out)


def train_tokenizer(seed: int) -> Any:
    """A byte-level BPE tokenizer trained on the training text; it can encode any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(islice(texts(seed, held_out=False), TOKENIZER_TEXTS), trainer)
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=256
    )


def pack(tokenizer: Any, stream: Iterator[str], count: int) -> np.ndarray:
    """Pack whole paragraphs into rows, (count, 3, LENGTH) int32: tokens, segment ids (0: padding) and positions."""
    rows = np.zeros((count, 3, LENGTH), np.int32)
    rows[:, 0] = tokenizer.pad_token_id
    row, used, segment = 0, 0, 1
    for text in stream:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if used + len(ids) > LENGTH:
            row, used, segment = row + 1, 0, 1
        if row == count:
            break
        rows[row, :, used : used + len(ids)] = ids, [segment] * len(ids), range(len(ids))
        used, segment = used + len(ids), segment + 1
    return rows


def new_model(tokenizer: Any) -> Any:
    """The decoder; its parameters are not initialised here."""
    from stablelora_jax.models.architecture import DecoderConfig
    from stablelora_jax.models.decoder import Decoder

    config = DecoderConfig(
        model_type="llama",
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=(tokenizer.eos_token_id,),
    )
    return Decoder(config, tokenizer=tokenizer)


def loss(model: Any, params: Any, rows: Any) -> Any:
    """The mean cross-entropy in nats per token; each token is predicted from those before it in its paragraph."""
    import jax
    import jax.numpy as jnp

    tokens, segments, positions = rows[:, 0], rows[:, 1], rows[:, 2]
    logits = model.apply({"params": params}, tokens[:, :-1], positions[:, :-1], segments[:, :-1])
    label_logits = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - label_logits) * mask) / jnp.sum(mask)


def pretrain(model: Any, rows: np.ndarray, seed: int) -> Any:
    """Train all parameters with AdamW for one epoch over ``rows``, in order; returns the parameters."""
    import jax
    import optax
    from tqdm import tqdm

    steps = len(rows) // BATCH
    params = model.init(jax.random.key(seed), rows[:1, 0])["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARMUP, steps - 1), steps, LEARNING_RATE / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1))

    @jax.jit
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss, argnums=1)(model, params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    with tqdm(rows.reshape(steps, BATCH, *rows.shape[1:]), desc="pretraining", disable=None, unit="step") as batches:
        for batch in batches:
            params, state, value = step(params, state, batch)
            batches.set_postfix(loss=f"{float(value):.3f}", refresh=False)
    return params


def held_out_loss(model: Any, params: Any, seed: int) -> float:
    """The loss on held-out paragraphs, which pretraining from any seed never uses."""
    import jax

    rows = pack(model.tokenizer, texts(seed, held_out=True), HELD_OUT_ROWS)
    return float(jax.jit(loss, static_argnums=0)(model, params, rows))


def make_base(output: Path, seed: int, steps: int) -> float:
    """Create the base model in the new or empty directory ``output``; returns its held-out loss in nats per token.

    Raises:
      InputError: ``output`` is not empty, or ``seed`` or ``steps`` is out of range.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not an empty directory; choose another --output")
    if steps < 1 or seed < 0:
        raise InputError(f"--steps must be at least 1 and --seed at least 0, not {steps} and {seed}")
    import jax

    from stablelora_jax.models.pretrained.load import save_pretrained

    tokenizer = train_tokenizer(seed)
    model = new_model(tokenizer)
    params = pretrain(model, pack(tokenizer, texts(seed, held_out=False), steps * BATCH), seed)
    record = {
        "seed": seed,
        "steps": steps,
        "held_out_loss": round(held_out_loss(model, params, seed), 6),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "versions": {name: version(name) for name in ("jax", "flax", "optax")},
    }
    save_pretrained(output, model, params)
    (output / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    return record["held_out_loss"]


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and create the model; returns the exit code."""
    parser = argparse.ArgumentParser(description="Pretrain the small base model on generated text and save it.")
    parser.add_argument("--output", type=Path, default=Path("runs/base"), help="new or empty directory (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text and the initialisation (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"training steps of {BATCH} rows of {LENGTH} tokens (%(default)s)"
    )
    args = parser.parse_args(argv)
    os.environ["NPROC"] = THREADS
    return exit_code(lambda: work(args))


def work(args: argparse.Namespace) -> None:
    """Create the model and print its held-out loss."""
    value = make_base(args.output, args.seed, args.steps)
    print(f"held-out loss {value:.4f} nats per token; the model is in {args.output}")


if __name__ == "__main__":
    sys.exit(main())
