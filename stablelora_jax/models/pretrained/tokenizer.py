"""The tokenizer of a model directory, without PyTorch, without guessing, and without code from the directory.

``tokenizer.json`` holds the whole tokenizer, so it is read as it is. ``AutoTokenizer`` is *not* used where that file
exists: transformers 5 replaces the tokenizer of some model types (``qwen2`` among them) by its own class built over
the same vocabulary, which gives other ids without an error. Code that a directory brings (``auto_map``) is never run,
nor does anybody ask whether it should be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stablelora_jax.utils.errors import InputError, brief

PARTS = ("normalizer", "pre_tokenizer", "decoder")
GROWTH = 64  # how many times as long a tokenizer may make a text
LONGEST = 10_000  # characters of an expression
SUSPECT = (b'"normalizer"', b'"pre_tokenizer"', b'"decoder"', rb"\u00")
HIDDEN = rb'"(?:normalizer|pre_tokenizer|decoder)"\s*:\s*\{|\\u00[4-7]'  # a part after the vocabulary, or escaped
# a repeated group that holds a repetition: (a+)+ tries every way to cut a run of letters in pieces
_INSIDE = r"(?:[^()\\\[\]]|\\.|\[(?:[^\]\\]|\\.)*\])*"
NESTED = re.compile(rf"\({_INSIDE}(?:[*+]|\{{\d+,\d*\}}){_INSIDE}\)(?:[*+]|\{{\d+,)")


def load_tokenizer(directory: Path) -> Any | None:
    """The tokenizer of ``directory`` (``transformers`` fast tokenizer), or None where the directory has none.

    Raises:
      InputError: tokenizer files are there but cannot be read; they need code of their own; or they would make a text
        longer, or take longer, than any tokenizer of a language model does.
    """
    files = {name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (directory / name).is_file()}
    if not files:
        return None
    import transformers

    whole = "tokenizer.json" in files
    if whole:
        _require_bounded(directory / "tokenizer.json")
    reader = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
    try:
        return reader.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare Exception for damaged files
        if not whole and _names_code(directory):
            raise InputError(
                f"{directory}: its tokenizer cannot be read: it needs code of its own (auto_map), which is never run; "
                "put a tokenizer.json beside the weights"
            ) from None
        raise InputError(f"{directory}: its tokenizer cannot be read: {brief(error)}") from None


def _names_code(directory: Path) -> bool:
    try:
        return "auto_map" in json.loads((directory / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def _require_bounded(path: Path) -> None:
    """Refuse rules that flood the memory or never end: they run inside the library, where nothing stops them."""
    raw = _read_rules(path)
    for part in PARTS:
        growth = 1.0
        for rule in _rules(raw.get(part)):
            pattern = rule.get("pattern")
            expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
            if isinstance(expression, str) and (len(expression) > LONGEST or NESTED.search(expression)):
                raise InputError(
                    f"{path}: the {part}'s expression {expression!r:.60} may never end: it repeats a repetition"
                )
            growth *= max(1.0, _growth(rule, pattern))
        if growth > GROWTH:
            raise InputError(f"{path}: the {part} makes a text {growth:.0f} times as long: it is no language model's")


def _read_rules(path: Path) -> Mapping[str, Any]:
    """The content of ``tokenizer.json``; without the model, which holds the vocabulary, where that comes last."""
    try:
        content = path.read_bytes()
        head, found, tail = content.partition(b'"model"')
        hidden = any(part in tail for part in SUSPECT) and re.search(HIDDEN, tail)
        if found and not hidden:
            with suppress(ValueError):
                return _object(json.loads(head.rstrip().removesuffix(b",") + b"}"), path)
        return _object(json.loads(content), path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.parent}: its tokenizer cannot be read: {path.name}: {brief(error)}") from None


def _object(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _growth(rule: Mapping[str, Any], pattern: Any) -> float:
    content = next((rule[key] for key in ("content", "prepend") if isinstance(rule.get(key), str)), "")
    given = pattern.get("String") if isinstance(pattern, Mapping) else None
    return len(content) / max(1, len(given) if isinstance(given, str) else 1)


def _rules(node: Any) -> Iterator[Mapping[str, Any]]:
    """``node`` and every rule inside it."""
    if isinstance(node, Mapping):
        yield node
        for part in node.values():
            yield from _rules(part)
    elif isinstance(node, list):
        for part in node:
            yield from _rules(part)
