"""Write adapters as a GGUF file that llama.cpp applies at run time (``--lora``).

The layout is that of its ``convert_lora_to_gguf.py``: ``blk.N.attn_q.weight.lora_a`` (r, in) and ``.lora_b`` (out, r),
for the embedding ``token_embd.weight.lora_a`` (vocabulary, r), and one ``adapter.lora.alpha``. llama.cpp's scale is
alpha over the rank of each tensor (``src/llama-adapter.h``), so rsLoRA becomes a larger alpha, and alphas that differ
between modules are folded into ``lora_b``. In architecture ``llama`` the rows of q and k are permuted, and so are those
of their ``lora_b``. DoRA and modules trained in full are refused: the format has no tensors for them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stablelora_jax.lora.leaves import adapter_target_modules, trains_pairs
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.to_lora import to_lora
from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.gguf import gguf_name, permute
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, partial_name

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
EMBEDDING = "token_embd.weight"  # its lora_a is read row by row
MARK = "stablelora_jax.writer"  # our own key, which llama.cpp does not read
MERGED = "export the merged model instead"


@checked
def save_gguf_adapter(path: str | Path, adapters: Mapping[str, Any], spec: LoraSpec, config: DecoderConfig) -> None:
    """Write ``adapters`` as a GGUF file, float32, for a GGUF file of the model that ``config`` describes.

    Args:
      path: of the file; a file that this function has written is replaced atomically.
      adapters: as made by ``init_adapters`` for ``spec``; the file has their bits where all modules have one alpha, and
        of other parametrisations the LoRA that :func:`.to_lora` gives.
      spec: the spec of the adapters.
      config: of the base, ``model.config``.

    Raises:
      InputError: adapters that do not fit the spec, are not finite, or are more than plain LoRA; an architecture that
        is not supported; another program's file at ``path``.
    """
    arch = ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise InputError(f"llama.cpp's name for model_type {config.model_type!r} is not known here; {MERGED}")
    sizes = None if trains_pairs(spec) else abstract_params(Decoder(config))  # pairs tell them themselves
    adapters, spec = to_lora(adapters, spec, params=sizes)
    for keys, _ in jax.tree_util.tree_leaves_with_path(adapters):
        path_in_tree = tree.keys_of(keys)
        if path_in_tree[-1] not in ("lora_a", "lora_b"):
            raise InputError(f"{'.'.join(path_in_tree)}: a GGUF adapter is plain LoRA and has no such tensor; {MERGED}")
    targets = adapter_target_modules(adapters, spec)
    alpha = _common_alpha(list(targets.values()))
    with np.errstate(over="ignore"):  # overflow gives infinity, which is refused below
        tensors = {name: x for target in targets.values() for name, x in _gguf_tensors(target, adapters, alpha, config)}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or infinity: nothing was written to {path}")
    try:
        _write(as_path(path), arch, float(alpha), tensors)
    except OSError as error:
        raise InputError(f"cannot write the adapter to {path}: {error.strerror or error}") from None


def _common_alpha(targets: list[TargetModule]) -> np.float32:
    """The most frequent alpha: scale times rank."""
    alphas = Counter(
        _alpha(rank, scale)
        for target in targets
        for rank, scale in zip(target.ranks, target.scales, strict=True)
        if rank
    )
    for alpha in alphas:
        if not 0 < alpha < np.inf:  # llama.cpp takes an alpha of 0 to mean a scale of 1
            raise InputError(f"alpha {alpha}, scale times rank, is not a positive float32; {MERGED}")
    return alphas.most_common(1)[0][0]


def _alpha(rank: int, scale: float) -> np.float32:
    with np.errstate(over="ignore"):  # infinity is refused above
        return np.float32(scale * rank)


def _gguf_tensors(
    target: TargetModule, adapters: Mapping[str, Any], alpha: np.float32, config: DecoderConfig
) -> Iterator[tuple[str, np.ndarray]]:
    pair = tree.get_in(adapters, target.path)
    a = np.asarray(pair["lora_a"], np.float32).reshape(-1, target.size[0], target.rank)
    b = np.asarray(pair["lora_b"], np.float32).reshape(-1, target.rank, target.size[1])
    for i, (name, rank, scale) in enumerate(zip(target.names, target.ranks, target.scales, strict=True)):
        if rank:
            tensor = _tensor_name(name, config)
            own_a, own_b = a[i, :, :rank], b[i, :rank].T
            if _alpha(rank, scale) != alpha:
                own_b = own_b * (_alpha(rank, scale) / alpha)
            if heads := _permuted_heads(name, config):
                own_b = permute(own_b, heads)
            yield f"{tensor}.lora_a", np.ascontiguousarray(own_a if tensor == EMBEDDING else own_a.T)
            yield f"{tensor}.lora_b", np.ascontiguousarray(own_b)


def _tensor_name(name: str, config: DecoderConfig) -> str:
    target = gguf_name(name)
    if target is None:
        raise InputError(f"{name} is not a weight that llama.cpp knows of; {MERGED}")
    if target in (EMBEDDING, "output.weight") and config.tie_word_embeddings:
        raise InputError(f"llama.cpp adapts neither embedding nor head where they are tied, as {name} is; {MERGED}")
    return target


def _permuted_heads(name: str, config: DecoderConfig) -> int:
    """The number of heads by which the rows of this module are permuted; 0 if they are not."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.rsplit(".", 1)[-1], 0) if ARCHITECTURES[config.model_type] == "llama" else 0


def _write(path: Path, arch: str, alpha: float, tensors: dict[str, np.ndarray]) -> None:
    try:
        import gguf
    except ImportError:
        raise InputError('writing GGUF needs the package gguf: pip install "stablelora-jax[gguf]"') from None
    if os.path.lexists(path) and not _is_own(path):
        raise InputError(
            f"cannot write the adapter to {path}: the file there was not written by stablelora_jax; choose another path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        with closing(gguf.GGUFWriter(partial, arch)) as writer:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(MARK, "stablelora_jax")
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            for name, array in tensors.items():
                writer.add_tensor(name, array)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    """Whether ``path`` is a regular file with our key in its header."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return head.startswith(b"GGUF") and MARK.encode() in head
