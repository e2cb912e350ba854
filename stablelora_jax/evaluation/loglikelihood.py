"""Log-likelihood of texts, tokenised, cut and summed as EleutherAI's lm-evaluation-harness does.

The rules are those of ``lm_eval/api/model.py`` (``_encode_pair``, the empty context) and
``lm_eval/models/huggingface.py`` (special tokens, truncation from the left, rolling windows). Log-probabilities are at
least float32. Equal requests are computed once, so that identical choices score identically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from stablelora_jax.data import bucket
from stablelora_jax.generation.decode import decoder_of
from stablelora_jax.models.inputs import require_known
from stablelora_jax.parallel import Layout, gather
from stablelora_jax.training.cross_entropy import token_scores
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.progress import track

STEP = 16  # scored tokens of a row are padded to a multiple of it


class Request(NamedTuple):
    """The log-likelihood of ``continuation`` after ``context`` is wanted."""

    context: tuple[int, ...]  # at least one token
    continuation: tuple[int, ...]  # at least one token


class Rows(NamedTuple):
    """A batch of requests; K is the most scored tokens of a row. All int32."""

    tokens: np.ndarray  # (B, T), padded at the end; without the last token of a text, which is only a target
    logit_positions: np.ndarray  # (B, K) indices into T
    targets: np.ndarray  # (B, K): the next tokens
    mask: np.ndarray  # (B, K): 1 where there is a target


class Likelihood(NamedTuple):
    """The answer to a request."""

    total: float  # sum of log-probabilities
    greedy: bool  # whether each token of the continuation is the most likely


LoglikelihoodFn = Callable[[Rows], tuple[np.ndarray, np.ndarray]]


def make_compute(model: Any, layout: Layout) -> Callable[[Any, Any, Rows], tuple[np.ndarray, np.ndarray]]:
    """``(params, others, rows) -> ((B,) summed log-probabilities, (B,) all greedy)``, the rows spread over all devices.

    ``model`` is a ``Decoder``, or an adapted one; ``params`` are placed by ``layout.base_sharding``, ``others`` are all
    other collections (``{"lora": adapters}`` or none), placed by ``layout.place_state``; every process passes all rows.
    Logits exist for a chunk of the scored tokens at a time; one compilation for each (B, T, K). A token outside the
    vocabulary is an InputError.
    """

    def compute(params: Any, others: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
        variables, parts = {"params": params, **others}, layout.parts if layout.axis is None else 1
        x = model.apply(variables, rows.tokens, logit_positions=rows.logit_positions, method="hidden")
        head = lambda x: model.apply(variables, x, method="logits")  # noqa: E731
        log_probs, most_likely = token_scores(head, x, rows.targets, parts=parts)
        greedy = most_likely | (rows.mask == 0)
        own = (log_probs * rows.mask).sum(axis=1), greedy.all(axis=1)
        every: tuple[jax.Array, jax.Array] = gather(own, layout.axis)
        return every

    compiled, vocabulary = layout.compile(compute, ("base", "state", "rows")), decoder_of(model).config.vocab_size

    def run(params: Any, others: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        require_known(rows.tokens, vocabulary)
        require_known(rows.targets, vocabulary)
        answers: Any = layout.fetch(compiled(params, others, layout.split(rows)))
        return answers[0], answers[1]

    return run


def likelihoods(
    compute: LoglikelihoodFn, requests: Sequence[Request], *, rows: int, max_length: int, progress: bool = False
) -> list[Likelihood]:
    """The answers to ``requests``, in their order.

    Args:
      compute: the function of :func:`make_compute`, with its variables.
      requests: equal ones are computed once.
      rows: of a batch; a multiple of ``layout.parts``.
      max_length: the most input tokens of the model; longer texts are truncated from the left.
      progress: show the progress on stderr.

    Raises:
      InputError: a request without a token of context or continuation, or whose continuation alone is too long.
    """
    different = sorted(set(requests), key=lambda request: (-len(request.context) - len(request.continuation), request))
    for context, continuation in different:
        if not context or not 0 < len(continuation) <= max_length:
            raise InputError(f"{len(continuation)} tokens after {len(context)} cannot be scored in {max_length}")
        if not -(2**31) <= min(context + continuation) <= max(context + continuation) < 2**31:
            raise InputError("the tokenizer gives ids beyond int32, and so beyond any vocabulary")
    chunks = [different[start : start + rows] for start in range(0, len(different), rows)]
    T = [min(bucket(len(_read(chunk[0], max_length))), max_length) for chunk in chunks]
    K: dict[int, int] = {}
    for chunk, length in zip(chunks, T, strict=True):
        most = max(len(request.continuation) for request in chunk)
        K[length] = min(max(K.get(length, 0), -(-most // STEP) * STEP), length)
    found: dict[Request, Likelihood] = {}
    for chunk, length in zip(track(chunks, "likelihood", "batches", hidden=not progress), T, strict=True):
        total, greedy = compute(_rows(chunk, rows, length, K[length], max_length))
        for request, value, same in zip(chunk, total, greedy, strict=False):
            found[request] = Likelihood(float(value), bool(same))
    return [found[request] for request in requests]


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The tokens of ``text`` with the tokenizer's own special ones, but no second BOS before a written one."""
    written = text.startswith(tokenizer.decode([prefix_token(tokenizer)]))
    return tuple(tokenizer.encode(text, add_special_tokens=False) if written else tokenizer.encode(text))


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Request:
    """Tokenise ``context + continuation`` together; trailing white space of the context goes to the continuation.

    Without a context, the continuation follows the BOS token, or the EOS where there is none.

    Raises:
      InputError: the tokenizer has neither.
    """
    if not context:
        first, own = prefix_token(tokenizer), tuple(tokenizer.encode(continuation, add_special_tokens=False))
        return Request(own[:1], own[1:]) if own[:1] == (first,) else Request((first,), own)
    bare = context.rstrip()
    given, whole = encode(tokenizer, bare), encode(tokenizer, context + continuation)
    return Request(given, whole[len(given) :])


def rolling(tokens: Sequence[int], prefix: int, max_length: int) -> list[Request]:
    """Requests that together predict each of ``tokens`` once, ``prefix`` before the first, each in a full window."""
    own, requests = tuple(tokens), []
    for start in range(0, len(own), max_length):
        end = min(start + max_length, len(own))
        context = (prefix,) if start == 0 else own[end - max_length - 1 : start]
        requests.append(Request(context, own[start:end]))
    return requests


def prefix_token(tokenizer: Any) -> int:
    """The context of a text without one: the BOS token, or the EOS where there is none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("the tokenizer has neither a BOS nor an EOS token to begin a text with")


def _read(request: Request, max_length: int) -> tuple[int, ...]:
    """Input tokens of a request."""
    return (request.context + request.continuation)[-(max_length + 1) : -1]


def _rows(chunk: Sequence[Request], B: int, T: int, K: int, max_length: int) -> Rows:
    tokens = np.zeros((B, T), np.int32)
    positions, targets, mask = (np.zeros((B, K), np.int32) for _ in range(3))
    for i, request in enumerate(chunk):
        read, k = _read(request, max_length), len(request.continuation)
        tokens[i, : len(read)] = read
        positions[i, :k], targets[i, :k], mask[i, :k] = np.arange(len(read) - k, len(read)), request.continuation, 1
    return Rows(tokens, positions, targets, mask)
