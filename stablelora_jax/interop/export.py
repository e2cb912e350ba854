"""Export adapters: a run, or an adapter, in the format of another program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import yaml
from jax.typing import DTypeLike

from stablelora_jax.interop.gguf_adapter import save_gguf_adapter
from stablelora_jax.interop.merged import save_merged
from stablelora_jax.interop.metadata import OURS, load_metadata
from stablelora_jax.interop.peft import load_peft, save_peft
from stablelora_jax.interop.vllm import save_vllm
from stablelora_jax.lora.peft_config import CONFIG, read_config
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import base_directory, load_pretrained
from stablelora_jax.models.untie import untie
from stablelora_jax.quantization import FORMATS
from stablelora_jax.utils import safe_yaml
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError, brief
from stablelora_jax.utils.files import as_path
from stablelora_jax.utils.outputs import new_directory, new_file

KINDS = ("peft", "vllm", "gguf", "merged")


class Source(NamedTuple):
    """What is exported."""

    directory: Path  # of the adapter, in PEFT's layout
    base: str  # the path or hub id of its base
    model: Decoder
    params: Any
    adapters: Any
    spec: LoraSpec


@checked
def export(
    path: str | Path,
    kind: str,
    *,
    output: str | Path | None = None,
    base: str | None = None,
    dtype: str | None = None,
    apart: bool = False,
    strict: bool = False,
    log_fn: Callable[[str], None] = print,
) -> Path:
    """Write the adapter at ``path`` for another program, whole or not at all.

    Args:
      path: a run directory of ``experiments/train.py``, or an adapter in PEFT's layout.
      kind: ``peft``, ``vllm``, ``gguf`` (an adapter for llama.cpp) or ``merged`` (a Hugging Face model).
      output: where to; ``PATH/export/KIND`` unless given (with ``.gguf`` for ``gguf``). It must not exist.
      base: path or hub id of the base; the one that run or adapter name unless given.
      dtype: of a merged model's weights; that of the run, or float32. They are merged from the base as the run had
        it, else in float32, and rounded once.
      apart: give a tied head its own weights, for an adapter that changes it or the embedding alone.
      strict: refuse an adapter that was made on another base, of which there is a warning otherwise.
      say: gets one line about what was written.

    Returns:
      What was written.

    Raises:
      InputError: no such run or base, a feature that ``kind`` cannot express, or an output that exists.
    """
    path = as_path(path, "the run or adapter")
    if kind not in KINDS:
        raise InputError(f"--to must be one of {', '.join(KINDS)}, not {kind!r}")
    out = output or path / "export" / ("adapter.gguf" if kind == "gguf" else kind)
    with (new_file if kind == "gguf" else new_directory)(out) as partial:
        source = open_source(path, base, apart=apart, strict=strict)
        try:
            note = _write(source, kind, partial, dtype)
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    log_fn(f"{out}: {note}")
    return as_path(out)


def locate_adapter(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Where the adapter of ``path`` lies, and what is known of the base that it was trained on.

    That is ``path``, ``dtype``, ``untie`` and ``quantize``, as far as they are in ``stablelora.json`` or, where
    ``path`` is a run, under ``model`` in its ``config.yaml``.

    Raises:
      InputError: there is neither an adapter in PEFT's layout nor a run that has ended.
    """
    path = as_path(path, "the adapter")
    if (path / CONFIG).is_file():
        return path, load_metadata(path)
    made, run = (path / "adapter" / CONFIG).is_file(), (path / "config.yaml").is_file()
    if run and not made:
        raise InputError(f"{path} has no adapter yet: the run has not ended; its command goes on with it")
    if not made:
        raise InputError(f"{path} is neither a run directory (config.yaml) nor an adapter ({CONFIG})")
    return path / "adapter", _model_of_run(path / "config.yaml") if run else load_metadata(path / "adapter")


def _model_of_run(path: Path) -> dict[str, Any]:
    """What ``config.yaml`` of a run says about its base.

    Raises:
      InputError: it cannot be read.
    """
    try:
        whole = yaml.load(path.read_text(encoding="utf-8"), Loader=safe_yaml.Loader)
        return {"path": None, **whole["model"]}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not what a run has written: {brief(error)}; export its adapter/ instead") from None


@checked
def open_source(
    path: str | Path,
    base: str | None = None,
    dtype: DTypeLike | None = None,
    *,
    apart: bool = False,
    strict: bool = False,
) -> Source:
    """Load adapter and base of a run directory or of an adapter in PEFT's layout; ``apart`` unties a tied head first.

    ``base`` and ``dtype`` (of the model) are those of the run, or what the adapter names and float32, unless given. The
    base is quantised as the run's was, which an adapter's ``stablelora.json`` says, too. ``strict`` is that of
    :func:`stablelora_jax.interop.peft.load_peft`.

    Raises:
      InputError: neither is there, or the base is not named or cannot be loaded; as ``load_peft`` besides.
    """
    directory, about = locate_adapter(path)
    quantize = about.get("quantize")
    if quantize not in (None, *FORMATS):
        raise InputError(f"{directory / OURS}: quantize must be one of {', '.join(FORMATS)}, not {quantize!r}")
    usual = about.get("dtype", "float32")
    apart = apart or about.get("untie") is True
    if "path" in about:
        named = base or about["path"] or str(base_directory())
    else:
        named = base or read_config(directory).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise InputError(f"{directory / CONFIG} does not name its base: give --base MODEL")
    model, params = load_pretrained(named, dtype=jnp.dtype(usual if dtype is None else dtype), quantize=quantize)
    if apart:
        model, params = untie(model, params)
    adapters, spec = load_peft(directory, params, base_model=named, strict=strict)
    return Source(directory, named, model, params, adapters, spec)


def _write(source: Source, kind: str, out: Path, dtype: str | None) -> str:
    _, base, model, params, adapters, spec = source
    if kind == "peft":
        save_peft(out, adapters, spec, base_model=base, params=params, metadata=load_metadata(source.directory))
        return "a PEFT adapter (peft.PeftModel.from_pretrained)"
    if kind == "vllm":
        rank = save_vllm(out, adapters, spec, base_model=base, params=params)
        return f"an adapter for vLLM (--enable-lora --max-lora-rank {rank})"
    if kind == "gguf":
        save_gguf_adapter(out, adapters, spec, model.config)
        return "an adapter for llama.cpp (--lora)"
    check = save_merged(out, model, params, adapters, spec, dtype=dtype)
    share = check.difference / max(1.0, check.largest)
    return (
        f"a merged model in {dtype or model.dtype}; the largest difference between its logits and those of base and "
        f"adapter is {check.difference:.3g} on a sample ({share:.1e} of the largest logit, {check.largest:.3g})"
    )
