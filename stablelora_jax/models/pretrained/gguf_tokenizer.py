"""The tokenizer of a GGUF file, rebuilt from its ``tokenizer.ggml.*`` metadata as a ``transformers`` fast tokenizer.

Two models: ``gpt2`` (byte-level BPE; ``tokenizer.ggml.pre`` says how text is cut first) and ``llama`` (SentencePiece
with byte fallback). Patterns, token types and defaults follow llama.cpp, ``src/llama-vocab.cpp``. Where it and Hugging
Face treat text differently, the result is Hugging Face's: Qwen2 text is brought to Unicode's NFC, and a SentencePiece
vocabulary becomes merges in the order of ``transformers.tokenization_utils_base.generate_merges``, best score first.
Whatever changes ids and is not rebuilt here is refused by name. Errors do not name the file: the caller adds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Steps

from stablelora_jax.utils.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # llama.cpp's token types; 6 is a byte
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)  # matched in the text before it is cut
LONGEST = 2048  # characters of a token or merge; rebuilding merges takes the square of it
ELSE = "use the model's safetensors, or convert it again with llama.cpp's convert_hf_to_gguf.py"
SPACE = "\u2581"  # SentencePiece's visible blank

# Everything under tokenizer.ggml. that is read here; keys that end in _token_id are names and change no ids.
READ = frozenset("model pre tokens token_type scores merges add_bos_token add_eos_token add_space_prefix".split())
NEUTRAL: Mapping[str, Any] = {"token_type_count": 1, "add_sep_token": False, "remove_extra_whitespaces": False}


def _words(number: str) -> list[PreTokenizer]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + number + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]


PRE: Mapping[str, list[PreTokenizer]] = {
    "gpt-2": [ByteLevel(add_prefix_space=False)],  # its built-in pattern is GPT-2's
    "smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
    "qwen2": _words(r"\p{N}"),
    "llama-bpe": _words(r"\p{N}{1,3}"),
}
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # three names for one thing


def build_tokenizer(metadata: Mapping[str, Any], vocab_size: int) -> Any | None:
    """The file's tokenizer (``PreTrainedTokenizerFast``), or None where the file carries none.

    Args:
      metadata: of the GGUF file.
      vocab_size: rows of the embedding; no token id may be beyond them.

    Raises:
      InputError: the tokenizer is of an unknown kind, or its metadata is incomplete or inconsistent.
    """
    keys = [key for key in metadata if key.startswith("tokenizer.ggml.")]
    if not keys or metadata.get("tokenizer.ggml.model") in ("none", "no_vocab"):
        return None
    model = _need(metadata, "model")
    if model not in ("gpt2", "llama"):
        raise InputError(f"tokenizer.ggml.model {model!r:.60} is not supported (gpt2 and llama are): {ELSE}")
    for key in keys:
        name = key.removeprefix("tokenizer.ggml.")
        inert = name.endswith("_token_id") or (name in NEUTRAL and metadata[key] == NEUTRAL[name])
        if name not in READ and not inert:
            raise InputError(f"{key!r} = {metadata[key]!r:.60} is a feature that is not rebuilt: {ELSE}")
    tokens = _strings(metadata, "tokens")
    if len(tokens) > vocab_size:
        raise InputError(f"{len(tokens)} tokens are more than the {vocab_size} rows of token_embd.weight: {ELSE}")
    named = special_ids(metadata).values()  # a filler that was given a role is a token like any other
    types = _per_token(metadata, "token_type", len(tokens), int)
    types = [CONTROL if kind == UNUSED and i in named else kind for i, kind in enumerate(types)]
    tokenizer = (_byte_level if model == "gpt2" else _sentencepiece)(metadata, tokens, types)
    whole = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in WHOLE]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=kind != USER_DEFINED) for t, kind in whole])
    return _finish(tokenizer, metadata, tokens)


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
    """Ids of ``bos``, ``eos``, ``unk``, ``pad``, ``eot`` (end of turn) and ``eom`` (of message); None where unset."""
    default = {"bos": 1, "eos": 2, "unk": 0} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {}
    for name, key in (("unk", "unknown"), ("pad", "padding"), *((name, name) for name in ("bos", "eos", "eot", "eom"))):
        ids[name] = metadata.get(f"tokenizer.ggml.{key}_token_id", default.get(name))
        if not isinstance(ids[name], int | None):
            raise InputError(f"tokenizer.ggml.{key}_token_id = {ids[name]!r:.60} is not one id: {ELSE}")
    return ids


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    pre = _need(metadata, "pre")
    steps = PRE.get("llama-bpe" if pre in LLAMA3 else str(pre))
    if steps is None:
        known = ", ".join((*PRE, *LLAMA3[1:]))
        raise InputError(f"tokenizer.ggml.pre {pre!r:.60} is not supported ({known} are): {ELSE}")
    if _flag(metadata, "add_space_prefix", False):
        raise InputError(f"tokenizer.ggml.add_space_prefix has no agreed meaning for byte-level BPE: {ELSE}")
    vocab = _ids(tokens, types)
    merges = _merges(_strings(metadata, "merges"), vocab)
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=pre in LLAMA3))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Steps(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre != "default":
        raise InputError(f"tokenizer.ggml.pre {pre!r:.60} has no meaning for tokenizer model llama: {ELSE}")
    vocab = _ids(tokens, types)
    if "tokenizer.ggml.merges" in metadata:
        merges = _merges(_strings(metadata, "merges"), vocab)
    else:
        scores = _per_token(metadata, "scores", len(tokens), float)
        merges = _merges_by_score({t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL})
    unk = _token(tokens, special_ids(metadata)["unk"], "unk")
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = _flag(metadata, "add_space_prefix", True)
    blanks = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), blanks]) if prefix else blanks
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _finish(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    adds_bos = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3
    adds = {"bos": _flag(metadata, "add_bos_token", adds_bos), "eos": _flag(metadata, "add_eos_token", False)}
    ids = special_ids(metadata)
    special = {name: _token(tokens, ids[name], name) for name in ("bos", "eos", "unk", "pad")}
    for name, wanted in adds.items():
        if wanted and special[name] is None:
            raise InputError(f"tokenizer.ggml.{name}_token_id is missing, but texts are to get this token: {ELSE}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in special.items()},
        **{f"add_{name}_token": wanted for name, wanted in adds.items()},
        chat_template=_chat_template(metadata),
    )


def _chat_template(metadata: Mapping[str, Any]) -> Any:
    """The chat template, or a map of them by name, as ``transformers`` takes it; None where there is none."""
    names = metadata.get("tokenizer.chat_templates", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"tokenizer.chat_templates = {names!r:.60} is not a list of names: {ELSE}")
    found = {name: metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    found |= {"default": metadata["tokenizer.chat_template"]} if "tokenizer.chat_template" in metadata else {}
    for name, template in found.items():
        if not isinstance(template, str):
            raise InputError(f"the chat template {name!r:.60} is {template!r:.60}, not a text: {ELSE}")
    return found if names else found.get("default")


def _ids(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Token to id, without the fillers that converters add to reach the size of the embedding."""
    used = [(token, i) for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED]
    vocab = dict(used)
    if len(vocab) < len(used):
        twice = next(token for token, i in used if vocab[token] != i)
        raise InputError(f"the token {twice!r:.60} is in the vocabulary twice: convert the model again")
    return vocab


def _merges(lines: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for line in lines:
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(f"the merge {line!r:.60} is not made of vocabulary tokens: convert the model again")
        merges.append((left, right))
    return merges


def _merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, best piece first; then, as transformers has it, longest left part."""
    pairs = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    made = {left + right: score for score, left, right in pairs}
    if len(set(made.values())) < len(made):
        raise InputError(f"scores in tokenizer.ggml.scores tie, so the order of merges is unknown: {ELSE}")
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0], reverse=True)]


def _need(metadata: Mapping[str, Any], name: str) -> Any:
    if f"tokenizer.ggml.{name}" not in metadata:
        raise InputError(f"the key 'tokenizer.ggml.{name}' is missing: {ELSE}")
    return metadata[f"tokenizer.ggml.{name}"]


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = _need(metadata, name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"tokenizer.ggml.{name} = {values!r:.60} is not a list of strings: {ELSE}")
    if long := next((value for value in values if len(value) > LONGEST), None):
        raise InputError(f"tokenizer.ggml.{name}: {long[:40]!r}... has {len(long)} characters: no token of a model has")
    return values


def _per_token(metadata: Mapping[str, Any], name: str, count: int, kind: type[int] | type[float]) -> list[Any]:
    values = _need(metadata, name)
    if not isinstance(values, list) or len(values) != count:
        raise InputError(f"tokenizer.ggml.{name} does not have one value for each of the {count} tokens: {ELSE}")
    wrong = [value for value in values if not isinstance(value, kind) or not math.isfinite(value)]
    if wrong:
        raise InputError(f"tokenizer.ggml.{name} holds {wrong[0]!r:.60}, which is no {kind.__name__}: {ELSE}")
    return values


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise InputError(f"tokenizer.ggml.{name} = {value!r:.60} is neither true nor false: {ELSE}")
    return value


def _token(tokens: Sequence[str], index: int | None, name: str) -> str | None:
    if index is not None and not 0 <= index < len(tokens):
        raise InputError(f"the id {index} of the {name} token is outside the vocabulary of {len(tokens)} tokens")
    return None if index is None else tokens[index]
