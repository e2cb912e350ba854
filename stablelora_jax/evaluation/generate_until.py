"""Generate text up to a stop string, as lm-evaluation-harness does with Hugging Face models (``generate_until``).

A context keeps its last ``max_length - max_new_tokens`` tokens; the end-of-sequence token and its text are stops, too.
New tokens are decoded by themselves, without special ones, and cut before each stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stablelora_jax.evaluation.loglikelihood import encode
from stablelora_jax.generation.decode import decoder_of
from stablelora_jax.generation.generate import generate
from stablelora_jax.utils.errors import InputError


def generate_until(
    model: Any,
    variables: Mapping[str, Any],
    contexts: Sequence[str],
    stops: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    progress: bool = False,
    **sampling: Any,
) -> list[str]:
    """The model's continuation of each of ``contexts``; greedy unless ``sampling`` sets a ``temperature``.

    Raises:
      InputError: ``max_new_tokens`` leaves no room for a context, or what ``generate`` raises.
    """
    decoder = decoder_of(model)
    tokenizer, room = decoder.tokenizer, decoder.config.max_position_embeddings - max_new_tokens
    if room < 1:
        positions = decoder.config.max_position_embeddings
        raise InputError(f"max_new_tokens={max_new_tokens} leaves no room for a context in {positions} positions")
    eos = tokenizer.eos_token_id
    ends = tuple(dict.fromkeys((*decoder.config.eos_token_id, *(() if eos is None else (int(eos),)))))
    cuts = [stop for stop in stops if stop]
    made = generate(
        model,
        variables,
        [list(encode(tokenizer, context)[-room:]) for context in contexts],
        max_new_tokens=max_new_tokens,
        stop_ids=ends,
        stop_strings=cuts,
        batch_size=max(1, min(batch_size, len(contexts))),
        progress=progress,
        **sampling,
    )
    if eos is not None:
        cuts.append(tokenizer.decode([eos]))
    return [_cut(tokenizer.decode(list(one.tokens), skip_special_tokens=True), cuts) for one in made]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
