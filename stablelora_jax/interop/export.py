"""Export a run's adapter for PEFT, vLLM or llama.cpp, or merged into its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jax.typing import DTypeLike

from stablelora_jax.interop.gguf_adapter import save_gguf_adapter
from stablelora_jax.interop.merged import save_merged
from stablelora_jax.interop.metadata import OURS, load_metadata
from stablelora_jax.interop.peft import load_peft, save_peft
from stablelora_jax.interop.vllm import save_vllm
from stablelora_jax.lora.peft_config import CONFIG, read_config
from stablelora_jax.lora.spec import LoraSpec, shown
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import base_directory, load_pretrained
from stablelora_jax.models.untie import untie as untie_head
from stablelora_jax.quantization import FORMATS
from stablelora_jax.utils import safe_yaml
from stablelora_jax.utils.checked import as_dtype, checked
from stablelora_jax.utils.errors import InputError, brief
from stablelora_jax.utils.files import as_path
from stablelora_jax.utils.outputs import new_directory, new_file

KINDS = ("peft", "vllm", "gguf", "merged")
RUN = "config.yaml"  # of a run directory
DTYPES = ("float32", "bfloat16", "float16", "float64")


class BaseOptions(NamedTuple):
    """How the base of an adapter was loaded for training; None: the files do not say."""

    name: str | None = None  # path or hub id
    dtype: str | None = None
    untie: bool | None = None
    quantize: str | None = None


class Source(NamedTuple):
    """An adapter on its base."""

    directory: Path  # of the adapter, in PEFT's layout
    base: str  # path or hub id of the base
    model: Decoder
    params: dict[str, Any]
    adapters: dict[str, Any]
    spec: LoraSpec
    metadata: dict[str, Any]  # for stablelora.json


@checked
def export(
    path: str | Path,
    kind: str,
    *,
    output: str | Path | None = None,
    base: str | None = None,
    dtype: str | None = None,
    untie: bool = False,
    strict: bool = False,
    log_fn: Callable[[str], None] = print,
) -> Path:
    """Write the adapter at ``path`` for another program; after an error nothing is left at ``output``.

    Args:
      path: a run directory of ``experiments/train.py``, or an adapter in PEFT's layout.
      kind: ``peft``, ``vllm``, ``gguf`` (an adapter for llama.cpp) or ``merged`` (a Hugging Face model).
      output: path to write to, which must not exist; default ``PATH/export/KIND``, for ``gguf``
        ``PATH/export/adapter.gguf``.
      base: path or hub id of the base; default: the one that the run or the adapter names.
      dtype: of a merged model's weights; default: that of the run, else float32. They are merged in the base's dtype,
        at least in ``dtype``, and rounded once.
      untie: give a tied head its own weights first, for an adapter that changes the head or the embedding alone.
      strict: refuse an adapter that was trained on another base, instead of a warning.
      log_fn: called with one line about what was written.

    Returns:
      The path that was written.

    Raises:
      InputError: no such run or base, a feature that ``kind`` cannot express, or an output that exists.
    """
    path = as_path(path, "the run or adapter")
    if kind not in KINDS:
        raise InputError(f"--to must be one of {', '.join(KINDS)}, not {kind!r}")
    out = output or path / "export" / ("adapter.gguf" if kind == "gguf" else kind)
    with (new_file if kind == "gguf" else new_directory)(out) as partial:
        source = open_source(path, base, untie=untie, strict=strict)
        try:
            note = _write(source, kind, partial, dtype)
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    log_fn(f"{out}: {note}")
    return as_path(out)


def locate_adapter(path: str | Path) -> Path:
    """The directory of the adapter at ``path``: ``path`` itself, or ``adapter/`` of a run.

    Raises:
      InputError: there is neither an adapter in PEFT's layout nor a run that has ended.
    """
    path = as_path(path, "the adapter")
    if (path / CONFIG).is_file():
        return path
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    if (path / RUN).is_file():
        raise InputError(f"{path} has no adapter yet: the run has not ended; its command continues it")
    raise InputError(f"{path} is neither a run directory ({RUN}) nor an adapter ({CONFIG})")


def read_base_options(path: str | Path) -> BaseOptions:
    """How the base of the adapter at ``path`` was loaded for training.

    The source is ``model`` in the ``config.yaml`` of a run, also of one by an older version; for an adapter alone
    ``stablelora.json``, and the base's name in ``adapter_config.json``.

    Raises:
      InputError: no adapter, a damaged file, or a bad value; the message names the file.
    """
    path, directory = as_path(path, "the adapter"), locate_adapter(path)
    if directory != path and (path / RUN).is_file():
        source, found = path / RUN, _model_of_run(path / RUN)
        name = str(base_directory()) if found.get("path") is None else found["path"]
    else:
        source, found = directory / OURS, load_metadata(directory)
        name = read_config(directory).get("base_model_name_or_path")
    options = BaseOptions(name, found.get("dtype"), found.get("untie"), found.get("quantize"))
    if not isinstance(name, str | None):
        raise InputError(f"{source.parent}: the name of the base must be a string, not {shown(name)}")
    if options.dtype not in (None, *DTYPES):
        raise InputError(f"{source}: dtype must be one of {', '.join(DTYPES)}, not {shown(options.dtype)}")
    if not isinstance(options.untie, bool | None):
        raise InputError(f"{source}: untie must be true or false, not {shown(options.untie)}")
    if options.quantize not in (None, *FORMATS):
        raise InputError(f"{source}: quantize must be one of {', '.join(FORMATS)}, not {shown(options.quantize)}")
    return options


def _model_of_run(path: Path) -> Mapping[str, Any]:
    """``model`` in the ``config.yaml`` of a run; its keys are the same in every version."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=safe_yaml.Loader)["model"]
        if isinstance(found, Mapping):
            return found
        reason = "model must be a mapping"
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = brief(error)
    raise InputError(f"{path} is not the config.yaml of a run: {reason}; export the run's adapter/ instead")


@checked
def open_source(
    path: str | Path,
    base: str | None = None,
    dtype: DTypeLike | None = None,
    *,
    untie: bool = False,
    strict: bool = False,
) -> Source:
    """Load an adapter and its base, as it was loaded for training (:func:`read_base_options`).

    Args:
      path: a run directory or an adapter in PEFT's layout.
      base: path or hub id of the base; default: the one that the files name.
      dtype: of the model; default: that of training, else float32.
      untie: give a tied head its own weights, also where training did not.
      strict: as in :func:`stablelora_jax.interop.peft.load_peft`.

    Raises:
      InputError: there is no adapter, the base is not named or cannot be loaded; as ``load_peft`` besides.
    """
    directory, options = locate_adapter(path), read_base_options(path)
    name = base or options.name
    if not name:
        raise InputError(f"{directory / CONFIG} does not name its base: give --base MODEL")
    options = options._replace(untie=untie or options.untie)
    dtype = as_dtype(options.dtype or "float32" if dtype is None else dtype)
    model, params = load_pretrained(name, dtype=dtype, quantize=options.quantize)
    if options.untie:
        model, params = untie_head(model, params)
    adapters, spec = load_peft(directory, params, base_model=name, strict=strict)
    known = {key: value for key, value in options._asdict().items() if key != "name" and value is not None}
    return Source(directory, name, model, params, adapters, spec, {**load_metadata(directory), **known})


def _write(source: Source, kind: str, out: Path, dtype: str | None) -> str:
    """Write ``source`` to ``out`` and describe the result."""
    _, base, model, params, adapters, spec, metadata = source
    if kind == "peft":
        save_peft(out, adapters, spec, base_model=base, params=params, metadata=metadata)
        return "a PEFT adapter (peft.PeftModel.from_pretrained)"
    if kind == "vllm":
        rank = save_vllm(out, adapters, spec, base_model=base, params=params)
        return f"an adapter for vLLM (--enable-lora --max-lora-rank {rank})"
    if kind == "gguf":
        save_gguf_adapter(out, adapters, spec, model.config)
        return "an adapter for llama.cpp (--lora)"
    check = save_merged(out, model, params, adapters, spec, dtype=dtype)
    relative = check.difference / max(1.0, check.largest)
    return (
        f"a merged model in {dtype or model.dtype}; its logits differ from those of base and adapter by at most "
        f"{check.difference:.3g} on a sample ({relative:.1e} of the largest logit, {check.largest:.3g})"
    )
