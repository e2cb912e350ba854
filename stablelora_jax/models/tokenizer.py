"""The tokenizer that belongs to a model directory, without PyTorch and without guessing.

``tokenizer.json`` holds the whole tokenizer, so it is read as it is. ``AutoTokenizer`` is *not* used where that file
exists: transformers 5 replaces the tokenizer of some model types (``qwen2`` among them) by its own class built over
the same vocabulary, which gives other ids without an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stablelora_jax.errors import InputError, brief


def load_tokenizer(directory: Path) -> Any | None:
    """The tokenizer of ``directory`` (``transformers`` fast tokenizer), or None where the directory has none.

    Raises:
      InputError: tokenizer files are there but cannot be read.
    """
    files = {name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (directory / name).is_file()}
    if not files:
        return None
    import transformers

    reader = transformers.PreTrainedTokenizerFast if "tokenizer.json" in files else transformers.AutoTokenizer
    try:
        return reader.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exception for damaged files
        raise InputError(f"{directory}: its tokenizer cannot be read: {brief(error)}") from None
