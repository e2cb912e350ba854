"""From texts to batches: tokenise, truncate, cache, pack or pad, and order by a rule that needs no state.

Imports: utils, config.
"""

from stablelora_jax.data.batch import Batch, bucket, make_batch
from stablelora_jax.data.chat import encode_chat
from stablelora_jax.data.encoding import Example, Text, encode, templated, training_texts
from stablelora_jax.data.loader import (
    Loader,
    batch_of_step,
    longest_row,
    make_loader,
    most_segments,
    statistics,
    texts_of_rows,
)
from stablelora_jax.data.order import place_of_step, rows_of_step
from stablelora_jax.data.packing import Plan, first_fit, pack, plan_of
from stablelora_jax.data.token_cache import TokenStore, digest, tokenize_dataset

__all__ = [
    "Batch",
    "Example",
    "Loader",
    "Plan",
    "Text",
    "TokenStore",
    "batch_of_step",
    "bucket",
    "digest",
    "encode",
    "encode_chat",
    "first_fit",
    "longest_row",
    "make_batch",
    "make_loader",
    "most_segments",
    "pack",
    "place_of_step",
    "plan_of",
    "rows_of_step",
    "statistics",
    "templated",
    "texts_of_rows",
    "tokenize_dataset",
    "training_texts",
]
