"""What all commands share: their exit codes, and the options that choose a model."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from stablelora_jax.utils.errors import InputError, Interrupted, RunError, brief


def exit_code(work: Callable[[], Any], *, interrupted: str = "interrupted") -> int:
    """Do ``work`` and give the process's exit code: 0, or after one line on stderr what went wrong.

    2 for an :class:`InputError`, 1 for a :class:`RunError`, 128 + the signal's number for :class:`Interrupted`, and
    130 for any other KeyboardInterrupt; SIGTERM is an Interrupted, and the line of both is ``interrupted``. Other
    exceptions pass.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about PyTorch, which is not used
    try:
        with _terminated(interrupted):
            work()
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library, which derives it from BaseException
            raise
        print(f"error: the model's tokenizer does not take a text: {brief(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _terminated(line: str) -> Iterator[None]:
    """SIGTERM as an :class:`Interrupted`, where Python gives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, line)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, ``--adapter``, ``--merged``, ``--untie``, ``--strict``, ``--dtype``, as :func:`load_model` reads them."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face directory, GGUF file or hub id (default: the base that the adapter names)",
    )
    add("--adapter", metavar="DIR", type=Path, help="a PEFT directory, or a run directory")
    add("--merged", action="store_true", help="merge the adapter into the parameters first")
    add("--untie", action="store_true", help="give a tied head its own weights, for an adapter that changes one alone")
    add("--strict", action="store_true", help="refuse an adapter that was made on another base, instead of a warning")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default float32)")


def load_model(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model that was chosen, as :func:`stablelora_jax.interop.load_adapted.load_adapted_model` gives it.

    Raises:
      InputError: ``--merged`` without ``--adapter``, or what cannot be loaded.
    """
    if arguments.merged and arguments.adapter is None:
        raise InputError("--merged needs --adapter, the adapter to merge")
    if arguments.model is None:
        arguments.model = _base_of(arguments.adapter)
    elif any((Path(arguments.model) / name).exists() for name in ("adapter", "adapter_config.json")):
        raise InputError(f"{arguments.model} is an adapter, not a model: give it with --adapter {arguments.model}")
    from stablelora_jax.interop.load_adapted import load_adapted_model
    from stablelora_jax.parallel import require_devices
    from stablelora_jax.utils import compile_cache

    require_devices()
    compile_cache.enable()
    given = {"dtype": arguments.dtype, "merged": arguments.merged, "untie": arguments.untie}
    given["strict"] = arguments.strict
    return load_adapted_model(arguments.model, arguments.adapter, **given)


def _base_of(adapter: Path | None) -> str:
    """The name of the base that an adapter was trained on."""
    if adapter is None:
        raise InputError("name a MODEL, or with --adapter an adapter that names its base")
    from stablelora_jax.interop.export import locate_adapter, read_base_options

    name = read_base_options(adapter).name
    if not name:
        raise InputError(f"{locate_adapter(adapter)} does not name its base: give a MODEL")
    return name
