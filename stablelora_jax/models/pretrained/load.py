"""Pretrained decoders in and out: a Hugging Face directory, a hub id or a GGUF file <-> ``(model, params)``."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

from stablelora_jax.models.architecture import decoder_config, to_hf
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained import bitsandbytes
from stablelora_jax.models.pretrained.safetensors import ShardingRule, load_params
from stablelora_jax.models.pretrained.shards import require_own, write_safetensors
from stablelora_jax.models.pretrained.tensors import TensorSource, safetensors_source
from stablelora_jax.models.pretrained.tokenizer import load_tokenizer
from stablelora_jax.quantization import format_of, is_quantized
from stablelora_jax.utils.checked import as_dtype, checked
from stablelora_jax.utils.errors import InputError, brief, named
from stablelora_jax.utils.files import as_path, write_whole

if TYPE_CHECKING:
    from stablelora_jax.models.pretrained.gguf import GgufCheckpoint

TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]
GENERATION = "generation_config.json"
HUB_SKIP = ["original/*", "consolidated*", "onnx/*"]


@checked
def load_pretrained(
    path_or_id: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    sharding: Sharding | ShardingRule | None = None,
    quantize: str | None = None,
) -> tuple[Decoder, Any]:
    """Load a decoder of the Llama, Mistral, Qwen2 or Qwen3 family.

    Args:
      path_or_id: a Hugging Face directory (``config.json`` and safetensors), a ``.gguf`` file, or a hub id such as
        ``"Qwen/Qwen2-0.5B"``, which the hub's cache answers when there is no network.
      dtype: of the parameters and of matrix products; norms, attention and logits use at least float32.
      sharding: where the parameters go: one ``jax.sharding.Sharding`` for all, or a function of a leaf's path (a tuple
        of names) and shape; None is the default device. Tensors are read one by one, straight into ``dtype``.
      quantize: ``"nf4"`` or ``"int8"``: hold the kernels of the layers in 4.13 or 8 bits a number (see
        :mod:`stablelora_jax.quantization`); None: in ``dtype``, as all else in any case. What bitsandbytes has
        quantised to NF4 with double quantisation is taken over as it is.

    Returns:
      ``(model, params)``: ``model.apply({"params": params}, tokens)`` gives logits (B, T, V); ``model.config`` is a
      ``DecoderConfig``, with the end ids of ``generation_config.json`` where there are some, and ``model.tokenizer``
      the tokenizer of the same directory or file, or None.

    Raises:
      InputError: the files are missing, damaged, inconsistent, or describe a model that this decoder is not.
    """
    kind = as_dtype(dtype)
    if not jnp.issubdtype(kind, jnp.floating) or (kind.itemsize > 4 and not jax.config.read("jax_enable_x64")):
        raise InputError(f"dtype {kind} cannot be used here; float64 needs jax.config.update('jax_enable_x64', True)")
    if quantize is not None:
        format_of(quantize)
    try:
        raw, source, tokenizer, origin = _open(path_or_id)
    except OSError as error:  # a name that is too long, a loop of links, no permission
        raise InputError(f"{str(path_or_id):.200} cannot be read: {error.strerror or error}") from None
    if raw.get(bitsandbytes.KEY):
        raw, source = bitsandbytes.unpacked(raw, source)
        if quantize not in (None, "nf4"):
            raise InputError(f"{path_or_id} is quantised to nf4 already: leave quantize={quantize!r} out")
        quantize = "nf4"
    model = Decoder(decoder_config(raw, origin), dtype=kind, tokenizer=tokenizer)
    return model, load_params(abstract_params(model), source, kind, sharding, quantize)


def pretrained_tokenizer(path_or_id: str | Path) -> Any:
    """The tokenizer that :func:`load_pretrained` gives the model; no weights are read, nor fetched from the hub.

    Raises:
      InputError: there is no tokenizer, or its files are damaged.
    """
    path = as_path(path_or_id, "the model")
    if path.is_file():
        tokenizer = _open_gguf(path).tokenizer
    else:
        tokenizer = load_tokenizer(path if path.is_dir() else _download(str(path_or_id), TOKENIZER_FILES))
    return require_tokenizer(tokenizer, str(path_or_id))


def require_tokenizer(tokenizer: Any, model: str) -> Any:
    """``tokenizer``; an InputError where ``model`` has none."""
    if tokenizer is None:
        raise InputError(f"{model} has no tokenizer: put tokenizer.json and tokenizer_config.json beside its weights")
    return tokenizer


def base_directory() -> Path:
    """The small Llama that ships inside the package, made by ``experiments/pretrain_base.py``."""
    return Path(str(resources.files("stablelora_jax") / "assets" / "base"))


def abstract_params(model: Decoder) -> Any:
    """Shapes and dtypes of the parameters of ``model``, without making them."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(lambda t: model.init(jax.random.key(0), t), tokens)["params"]


@checked
def save_pretrained(
    directory: str | Path,
    model: Decoder,
    params: Any,
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write ``model`` and ``params`` as a Hugging Face directory that ``transformers`` and this package load.

    Args:
      directory: made if need be; a model that this function has written there is replaced.
      model: whose configuration and tokenizer, if any, go with the weights.
      params: the parameters; quantised kernels are written dequantised.
      dtype: of the tensors; default: that of each parameter.
      max_shard_size: bytes of one safetensors file; weights beyond it become several, with an index.

    Raises:
      InputError: files of another model are in ``directory``, or it cannot be written; a size that is not positive.
    """
    directory = as_path(directory, "the model's directory")
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, int) or max_shard_size < 1:
        raise InputError(f"max_shard_size must be a number of bytes, not {max_shard_size!r:.60}")
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise InputError(f"dtype {jnp.dtype(dtype)} cannot hold parameters: give float32, bfloat16 or float16")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        require_own(directory)
        _write_model(directory, model, params, dtype, max_shard_size)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror or brief(error)}") from None


def _write_model(directory: Path, model: Decoder, params: Any, dtype: DTypeLike | None, max_shard_size: int) -> None:
    write_safetensors(directory, params, dtype, max_shard_size)
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    written = jnp.dtype(dtype) if dtype is not None else jnp.result_type(*(leaf.dtype for leaf in leaves))
    config = to_hf(model.config)
    write_whole(directory / "config.json", json.dumps(config | {"dtype": written.name}, indent=2) + "\n")
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    write_whole(directory / GENERATION, json.dumps(ends, indent=2) + "\n")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(directory)


def _open(path_or_id: str | Path) -> tuple[dict[str, Any], TensorSource, Any, str]:
    path = as_path(path_or_id, "the model")
    if path.is_file():
        checkpoint = _open_gguf(path)
        source = TensorSource(str(path), checkpoint.shapes, checkpoint.read)
        return checkpoint.config, source, checkpoint.tokenizer, str(path)
    directory = path if path.is_dir() else _download(str(path_or_id), HUB_FILES)
    config, generation = directory / "config.json", directory / GENERATION
    if not config.is_file():
        raise InputError(f"{directory} has no config.json; give a Hugging Face model directory or a .gguf file")
    raw = _read_json(config)
    ends = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    raw |= {"eos_token_id": ends} if ends is not None else {}
    return raw, safetensors_source(directory), load_tokenizer(directory), str(config)


def _open_gguf(path: Path) -> GgufCheckpoint:
    if path.suffix != ".gguf":
        raise InputError(f"{path} is a file but not a .gguf; give the directory that holds config.json")
    from stablelora_jax.models.pretrained.gguf import read_gguf

    return read_gguf(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not JSON: {brief(error)}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(raw).__name__}")
    return raw


def _download(name: str, patterns: list[str]) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{name} does not exist: give a model directory, a .gguf file or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=HUB_SKIP))
    except Exception as error:  # many kinds: offline, no such repository, gated, rate limit
        reason = named(error)
        raise InputError(f"{name} is no local directory, and the hub did not give it ({reason})") from None
