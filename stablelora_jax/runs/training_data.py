"""The training data of a run: its rows, their schema, their tokens, and how many steps they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from stablelora_jax.config.run import MOST, JsonlTask, RunConfig, is_chat, takes_template
from stablelora_jax.data import (
    Loader,
    Text,
    TokenStore,
    digest,
    make_loader,
    statistics,
    tokenize_dataset,
    training_texts,
)
from stablelora_jax.data.encoding import preference_texts
from stablelora_jax.data.tasks import load_questions
from stablelora_jax.data.tasks.schemas import recognised
from stablelora_jax.models.pretrained.load import base_directory, pretrained_tokenizer
from stablelora_jax.runs.build import make_objective
from stablelora_jax.utils.errors import InputError


def texts_to_train_on(config: RunConfig) -> list[Text]:
    """The texts of the training split; of an objective over pairs, each right answer with a wrong one after it."""
    items = load_questions(config.task, "train")
    return training_texts(items) if config.objective.name == "sft" else preference_texts(items, config.seed)


def with_kind(config: RunConfig, log_fn: Callable[[str], None]) -> RunConfig:
    """The configuration with the kind of its task's rows, where that is ``auto``; it is logged."""
    if not isinstance(config.task, JsonlTask):
        return config
    return replace(config, task=recognised(config.task, log_fn))


def training_digest(config: RunConfig) -> str:
    """The digest of the training data as tokens; of the model, only the tokenizer is loaded."""
    tokenizer = pretrained_tokenizer(config.model.path or base_directory())
    texts, chat = texts_to_train_on(config), takes_template(config)
    how: dict[str, Any] = {"max_length": config.max_length, "truncate": config.data.truncate}
    how["loss_on"] = config.data.loss_on
    return digest(tokenizer, texts, chat=chat, **how)


def load_training_data(
    config: RunConfig,
    tokenizer: Any,
    log_fn: Callable[[str], None],
    once: Callable[[Any, Callable[[], TokenStore]], TokenStore] = lambda key, make: make(),
) -> Loader:
    """The loader of the training split; truncated texts are logged. ``once`` may keep the tokens for other runs."""
    pairs = None if config.objective.name == "sft" else config.seed
    key = "tokens", repr((config.task, config.data, config.max_length, pairs))
    store = once(key, lambda: _tokens(config, tokenizer, log_fn))
    sizes = {"max_length": config.max_length, "batch_size": config.batch_size, "seed": config.seed}
    group = make_objective(config).group
    return make_loader(store, batching=config.data.batching, group=group, **sizes)


def _tokens(config: RunConfig, tokenizer: Any, log_fn: Callable[[str], None]) -> TokenStore:
    data, texts, chat = config.data, texts_to_train_on(config), takes_template(config)
    if is_chat(config) and not chat:
        log_fn(
            "data.chat_template is false: chat messages are joined by blank lines, without the model's chat template"
        )
        _require_single_turns(config, texts)
    store = tokenize_dataset(
        tokenizer,
        texts,
        max_length=config.max_length,
        truncate=data.truncate,
        chat=chat,
        loss_on=data.loss_on,
        cache=data.cache,
        log_fn=log_fn,
    )
    if store.cut:
        log_fn(
            f"{store.cut} of {len(texts)} training texts are longer than max_length={config.max_length} "
            f"and truncated on the {data.truncate}"
        )
    if store.clipped or store.empty:
        log_fn(
            f"{store.clipped} of {len(texts)} chats lose a part of their answers to max_length={config.max_length}; "
            f"{store.empty} have nothing left to learn and are left out"
        )
    return store


def _require_single_turns(config: RunConfig, texts: Sequence[Text]) -> None:
    """That without a template no answer but the last is meant, and it is text."""
    for number, text in enumerate(texts, 1):
        if text.chat and (len(text.chat.turns) > 1 and config.data.loss_on == "assistant" or not text.answer.strip()):
            raise InputError(
                f"row {number} ({text.id}) is a chat of several turns or of tool calls, which needs the model's chat "
                "template: set data.chat_template to true, or data.loss_on to last"
            )


def with_steps(config: RunConfig, loader: Loader, log_fn: Callable[[str], None]) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration with its epochs as steps, and the statistics of the training data, which are logged."""
    if config.epochs is not None:
        steps = config.epochs * loader.rows / config.batch_size
        if steps > MOST["steps"]:
            raise InputError(f"epochs {config.epochs:g} are {steps:.3g} steps, more than {MOST['steps']}: name fewer")
        config = replace(config, steps=max(1, math.ceil(steps)), epochs=None)
    n = statistics(loader, config.steps)
    log_fn(
        f"{n['texts']} texts in {n['rows']} rows: {n['tokens']} tokens, {n['loss_tokens']} of them loss tokens; "
        f"{n['padding']:.1%} of a batch is padding; {config.steps} steps are {n['epochs']:.2f} epochs"
    )
    return config, n
