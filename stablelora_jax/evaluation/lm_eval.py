"""Models of this package for EleutherAI's lm-evaluation-harness, with or without an adapter: any task it has.

    import lm_eval
    from stablelora_jax.evaluation.lm_eval import StableLoraLM

    lm_eval.simple_evaluate(StableLoraLM("MODEL", adapter="RUN"), tasks=["piqa"])

The only module that imports ``lm_eval``, which this package does not depend on: ``pip install lm_eval``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax.numpy as jnp
from lm_eval.api.model import TemplateLM

from stablelora_jax.data.template import render
from stablelora_jax.evaluation.generate_until import generate_until
from stablelora_jax.evaluation.loglikelihood import Request, encode, likelihoods, prefix_token, rolling
from stablelora_jax.evaluation.tasks import subject
from stablelora_jax.generation.decode import decoder_of
from stablelora_jax.interop.load_adapted import load_adapted_model
from stablelora_jax.utils.errors import InputError

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
SAMPLING = ("temperature", "top_k", "top_p")


class StableLoraLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A base and an adapter with lm_eval's ``LM`` interface."""

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        *,
        dtype: str = "float32",
        merged: bool = False,
        untie: bool = False,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Load.

        Args:
          pretrained: Hugging Face directory, GGUF file or hub id.
          adapter: a run directory of ``experiments/train.py``, or an adapter in PEFT's layout.
          dtype: of the model.
          merged: fold the adapter into the parameters.
          untie: give a tied head its own weights first.
          batch_size: texts that run together; a number.
          max_batch_size: of lm_eval's own; not used.
          device: of lm_eval's own; JAX chooses.

        Raises:
          InputError: what cannot be loaded, or a batch size that is no positive number.
        """
        super().__init__()
        if not str(batch_size).isdigit():
            raise InputError(f"batch_size must be a positive number, not {batch_size!r}")
        model, variables = load_adapted_model(pretrained, adapter, dtype=jnp.dtype(dtype), merged=merged, untie=untie)
        self.subject = subject(model, variables, batch_size=int(batch_size))
        self.name = pretrained
        self.tokenizer = decoder_of(model).tokenizer
        self.max_length = decoder_of(model).config.max_position_embeddings
        self.max_gen_toks = 256
        self.batch_size = self.subject.batch_size

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one."""
        return prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm_eval's caches."""
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; None leaves special tokens to the tokenizer."""
        if add_special_tokens is None:
            return list(encode(self.tokenizer, string))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as one string, by the tokenizer's template."""
        (text,) = render(self.tokenizer, [chat_history], ["a chat"], continue_final_message=not add_generation_prompt)
        return text

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's length."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [rolling(tokens, self.prefix_token_id, self.max_length) for tokens in texts]
        answers = iter(self._answers([one for own in windows for one in own], disable_tqdm))
        totals = [sum((next(answers)[0] for _ in own), 0.0) for own in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to one of the request's stops."""
        made = [""] * len(requests)
        settings = [str(sorted(request.args[1].items())) for request in requests]
        order = sorted(range(len(requests)), key=settings.__getitem__)
        for _, group in groupby(order, key=settings.__getitem__):
            numbers = list(group)
            contexts = [requests[i].args[0] for i in numbers]
            for i, text in zip(numbers, self._say(contexts, requests[numbers[0]].args[1], disable_tqdm), strict=True):
                made[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return made

    def _say(self, contexts: list[str], given: dict[str, Any], quiet: bool) -> list[str]:
        stops = given.get("until") or []
        sampled = given.get("do_sample", bool(given.get("temperature")))
        longest = next((given[name] for name in LENGTHS if given.get(name) is not None), self.max_gen_toks)
        known = {"until", "do_sample", *LENGTHS, *SAMPLING}
        if unknown := sorted(set(given) - known):
            raise InputError(f"generation setting {unknown[0]!r} is not supported; {', '.join(sorted(known))} are")
        return generate_until(
            self.subject.model,
            self.subject.variables,
            contexts,
            [stops] if isinstance(stops, str) else stops,
            max_new_tokens=int(longest),
            batch_size=self.batch_size,
            progress=not quiet and self.subject.progress,
            **({"temperature": 1.0} | {name: given[name] for name in SAMPLING if name in given} if sampled else {}),
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **other: Any
    ) -> list[tuple[float, bool]]:
        answers = self._answers([Request(tuple(context), tuple(own)) for _, context, own in requests], disable_tqdm)
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _answers(self, requests: list[Request], quiet: bool) -> list[tuple[float, bool]]:
        found = likelihoods(
            self.subject.compute,
            requests,
            rows=self.batch_size,
            max_length=self.max_length,
            progress=not quiet and self.subject.progress,
        )
        return [(one.total, one.greedy) for one in found]
