"""The directory of a run: made once, gone on with by the same configuration alone, never overwritten by another."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from stablelora_jax import config
from stablelora_jax.errors import InputError
from stablelora_jax.files import write_whole
from stablelora_jax.run_config import RunConfig

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"


def locate(run_config: RunConfig) -> Path:
    """The run's directory: free to be made, or made by the same configuration. Writes nothing.

    Raises:
      InputError: the directory holds another run or other files, or cannot be made.
    """
    directory = Path(run_config.output or default_directory(run_config))
    mine = _identity(run_config)
    if (directory / CONFIG).is_file():
        theirs = _identity(config.load(RunConfig, directory / CONFIG))
        if theirs != mine:
            changed = ", ".join(sorted(_differences(theirs, mine)))
            raise InputError(f"{directory} holds a run with another {changed}: choose another output=")
    elif directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"{directory} exists and is no run directory: choose another output=")
    parent = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to {directory}: {parent} is no directory that can be written to")
    return directory


def create(directory: Path, run_config: RunConfig) -> None:
    """Make the directory and write the resolved configuration into it, unless it is there.

    Raises:
      InputError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / CONFIG).is_file():
            write_whole(directory / CONFIG, config.dump(run_config))
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror or error}") from None


def default_directory(run_config: RunConfig) -> str:
    """``runs/<task>-<digest>``: the digest is of all keys but ``output``, so other values are another directory."""
    digest = hashlib.sha256(json.dumps(_identity(run_config), sort_keys=True).encode()).hexdigest()
    return f"runs/{run_config.task.name}-{digest[:8]}"


def read_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    path = directory / SUMMARY
    return json.loads(path.read_text()) if path.is_file() else None


def _identity(run_config: RunConfig) -> dict[str, Any]:
    """What decides the result: every key but places on the disk; patterns as lists, since their order is meaning."""
    data = replace(run_config.data, cache=None)
    plain = config.to_dict(replace(run_config, output=None, data=data))
    lora = plain["lora"]
    lists = {name: [[key, value] for key, value in lora[name].items()] for name in ("rank_pattern", "alpha_pattern")}
    return {**plain, "lora": {**lora, **lists, "alpha": float(lora["alpha"])}}


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b})
        return [d for key in keys for d in _differences(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))]
    return [] if a == b else [path]
