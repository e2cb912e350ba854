"""The numbers Stable-LoRA is about, per pair and as one line of ``metrics.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.adapter import pairs
from stablelora_jax.files import write_whole


def norm_summary(adapters: Any) -> dict[str, jax.Array]:
    """Mean, least and greatest Frobenius norm of A and of B over all pairs (padding left out), float32 scalars."""
    summary = {}
    real = [
        ((p["lora_a"] != 0).any(axis=(-2, -1)) | (p["lora_b"] != 0).any(axis=(-2, -1))).ravel()
        for p in pairs(adapters).values()
    ]
    used = jnp.concatenate(real)
    for letter in "ab":
        norms = [jnp.linalg.norm(pair[f"lora_{letter}"], axis=(-2, -1)).ravel() for pair in pairs(adapters).values()]
        values = jnp.concatenate(norms)
        summary[f"norm_{letter}"] = jnp.where(used, values, 0).sum() / jnp.maximum(used.sum(), 1)
        summary[f"norm_{letter}_min"] = jnp.where(used, values, jnp.inf).min()
        summary[f"norm_{letter}_max"] = jnp.where(used, values, 0).max()
    return summary


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON to ``path``."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of ``path``, or none where it does not exist; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def keep_records_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records after ``step``, which a run that resumes there will write again; gives those kept."""
    records = [record for record in read_records(path) if record["step"] <= step]
    if path.is_file():
        write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    return records
