"""Plain text, for perplexity: rows ``{"text": ...}`` of ``SPLIT.jsonl`` in a local directory."""

from __future__ import annotations

from pathlib import Path

from stablelora_jax.data.tasks import rows
from stablelora_jax.utils.errors import InputError

METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity")


def texts(split: str, path: str | None) -> list[str]:
    """The texts of one split; errors: ``rows.load``."""
    if path is None:
        raise InputError("the task text has no place on the hub: give a local directory")
    return rows.parse(*rows.local_split(Path(path), split), split, lambda row, _: rows.text(row, "text"))
