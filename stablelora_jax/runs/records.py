"""The records of ``metrics.jsonl``: one JSON object a line, each with the ``step`` that it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stablelora_jax.training.metrics import NORMS
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import write_parts_whole

NUMERIC_KEYS = {"loss", "learning_rate", "acc", "acc_norm", *NORMS}  # of a record or an evaluation, checked on reading


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers that are not finite are None, in mappings and sequences too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON to ``path``: floats as their shortest exact form, ``null`` for those not finite."""
    with path.open("a") as file:
        file.write(json.dumps(plain(record), allow_nan=False) + "\n")


def each_record(path: Path) -> Iterator[dict[str, Any]]:
    """The records of ``path`` one by one, none where it does not exist; what a crash has cut short is left out.

    Raises:
      InputError: a record holds something else than a run writes; the message names file, line and key.
    """
    if path.is_file():
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if (record := _parse(line)) is not None:
                    _require_kinds(record, f"{path}, line {number}")
                    yield record


def keep_records_until(path: Path, step: int) -> None:
    """Drop the records after ``step``, which a run that resumes there will write again, and lines cut short.

    The file is replaced in one step, and only where something is to be dropped; what stays keeps its bytes.
    """

    def stays(line: bytes) -> bool:
        record = _parse(line)
        return record is not None and record["step"] <= step

    if not path.is_file():
        return
    with path.open("rb") as file:
        clean = all(stays(line) and line.endswith(b"\n") for line in file)
    if not clean:
        with path.open("rb") as file:
            write_parts_whole(path, (line.rstrip(b"\n") + b"\n" for line in file if stays(line)))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) else None


def _require_kinds(record: Mapping[str, Any], where: str) -> None:
    """Check all of a record that is read again; other keys may hold anything."""

    def require(key: str, good: bool, kind: str) -> None:
        if not good:
            raise InputError(f"{where}: {key} must be {kind}; put the line back as it was, or remove it")

    require("step", 0 <= record["step"] < 2**63, "a step from 0")
    for key in NUMERIC_KEYS & record.keys():
        require(key, _is_number(record[key]), "a number or null")
    for key in ("data", "validation", "stability", "stop_ratios"):
        require(key, isinstance(record.get(key, {}), dict), "a mapping")
    validation, stopped, terms = (
        record.get(key, kind) for key, kind in (("validation", {}), ("stopped", []), ("stability", {}))
    )
    for key in NUMERIC_KEYS & validation.keys():
        require(f"validation.{key}", _is_number(validation[key]), "a number or null")
    answers = validation.get("answers", [])
    require(
        "validation.answers", isinstance(answers, list) and all(type(x) is int for x in answers), "a list of indices"
    )
    require("stopped", isinstance(stopped, list) and all(isinstance(x, str) for x in stopped), "a list of names")
    own = all(
        isinstance(t, dict) and all(_is_number(x) or isinstance(x, bool) for x in t.values()) for t in terms.values()
    )
    require("stability", own, "a mapping of mappings of numbers")
    ratios = record.get("stop_ratios", {}).values()
    require("stop_ratios", all(_is_number(x) for x in ratios), "a mapping of numbers or null")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1023)
