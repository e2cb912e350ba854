"""Adapters for vLLM: plain LoRA with one rank and one scale, and a check of a directory.

vLLM (0.33: ``vllm/lora/peft_helper.py``, ``lora_model.py``) loads PEFT's format but refuses DoRA, trained biases,
``modules_to_save`` and ranks above the server's ``--max-lora-rank``; older versions silently ignore ``use_rslora`` and
the pattern maps. So smaller ranks are padded with zeros and scales are folded into B. An adapter that is not
equivalent to plain LoRA is refused; export it merged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.interop.peft import save_peft
from stablelora_jax.interop.peft_layout import EMBEDDING, is_tied
from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import as_dict
from stablelora_jax.lora.to_lora import to_lora
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import read_json_object

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that --max-lora-rank may have
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
REFUSED = """use_dora lora_bias alora_invocation_tokens layer_replication use_bdlora use_qalora modules_to_save
    rank_pattern alpha_pattern use_rslora""".split()
MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head embed_tokens".split()
TENSOR = re.compile(r"base_model\.model\.(.+)\.(?:lora_[AB]\.weight|lora_embedding_[AB])")


def save_vllm(
    directory: str | Path,
    adapters: Mapping[str, Any],
    spec: LoraSpec,
    *,
    base_model: str | None,
    params: Mapping[str, Any],
) -> int:
    """Write ``adapters`` as a PEFT directory that every version of vLLM with LoRA support applies correctly.

    Args:
      directory: as in :func:`stablelora_jax.save_peft`.
      adapters: as made by ``init_adapters`` for ``spec``; other parametrisations are written as the LoRA that
        :func:`.to_lora` gives.
      spec: the spec of the adapters.
      base_model: path or hub id of the base.
      params: of the base.

    Returns:
      The smallest ``--max-lora-rank`` that the server needs.

    Raises:
      InputError: DoRA, ``lora_bias``, parameters trained in full, an adapted tied embedding, or a rank above 512.
    """
    params = as_dict(params)
    adapters, spec = to_lora(adapters, spec, params=params)
    full = bool(spec.modules_to_save) or spec.bias != "none"
    if spec.parametrization != "lora" or spec.lora_bias or full:
        what = "parameters trained in full" if full else "lora_bias" if spec.lora_bias else spec.parametrization
        raise InputError(f"vLLM does not load {what} in an adapter: export it merged")
    if ("model", EMBEDDING) in adapter_target_modules(adapters, spec) and is_tied(params):
        raise InputError(f"vLLM does not load an adapter of {EMBEDDING} where the head is tied to it: export it merged")
    flat, plain = uniform(adapters, spec)
    if plain.rank > max(RANKS):
        raise InputError(f"vLLM serves ranks up to {max(RANKS)}, not {plain.rank}: export it merged")
    save_peft(directory, flat, plain, base_model=base_model, params=params)
    _drop_base_weights(Path(directory))
    if problems := vllm_problems(directory):
        raise InputError(f"{directory}: {problems[0]}")
    return min(rank for rank in RANKS if rank >= plain.rank)


def uniform(adapters: Mapping[str, Any], spec: LoraSpec) -> tuple[dict[str, Any], LoraSpec]:
    """Equivalent adapters with one rank r and one scale alpha / r: ``(adapters, spec)``.

    Smaller ranks are padded with zeros. Where all scales are equal, alpha is chosen to give that scale and the factors
    keep their bits; otherwise each B is multiplied by its own scale over the common one, in its dtype.
    """
    targets = adapter_target_modules(adapters, spec)
    rank = max(target.rank for target in targets.values())
    scales = {s for target in targets.values() for s, r in zip(target.scales, target.ranks, strict=True) if r}
    scale = scales.pop() if len(scales) == 1 else spec.alpha / rank
    made: dict[str, Any] = {}
    for path, target in targets.items():
        made = tree.set_in(made, path, _padded(tree.get_in(adapters, path), target, rank, scale))
    return made, replace(spec, rank=rank, alpha=scale * rank, scaling="lora", rank_pattern={}, alpha_pattern={})


def vllm_problems(directory: str | Path, max_lora_rank: int = max(RANKS)) -> list[str]:
    """What vLLM refuses, or interprets differently from PEFT, in the adapter at ``directory``; empty if nothing.

    Raises:
      InputError: ``adapter_config.json`` is missing or damaged.
    """
    from safetensors import safe_open

    directory = Path(directory)
    config = read_json_object(directory / "adapter_config.json")
    found = [f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    found += [f"{key} = {config[key]!r:.60} is not plain LoRA" for key in REFUSED if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"bias = {config['bias']!r:.60} is refused")
    if config.get("init_lora_weights", True) not in INITS:
        found.append(f"init_lora_weights = {config['init_lora_weights']!r:.60} is refused")
    if not found and config["r"] > max_lora_rank:
        found.append(f"r = {config['r']} is above the server's {max_lora_rank}")
    with safe_open(str(directory / "adapter_model.safetensors"), framework="numpy") as file:
        for name in file.keys():
            match = TENSOR.fullmatch(name)
            if not match or match[1].rsplit(".", 1)[-1] not in MODULES:
                found.append(f"tensor {name} is not of a module that takes LoRA")
    return found


def _padded(pair: Mapping[str, jax.Array], target: TargetModule, rank: int, scale: float) -> dict[str, jax.Array]:
    wide = [(0, 0)] * len(target.stack)
    a = jnp.pad(pair["lora_a"], [*wide, (0, 0), (0, rank - target.rank)])
    b = jnp.pad(pair["lora_b"], [*wide, (0, rank - target.rank), (0, 0)])
    factors = np.array(target.scales).reshape(target.stack) / scale
    return {"lora_a": a, "lora_b": b * jnp.asarray(factors, b.dtype)[..., None, None]}


def _drop_base_weights(directory: Path) -> None:
    """Remove the base's own weights of an adapted embedding or head, which vLLM ignores."""
    from safetensors.numpy import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {name: array for name, array in tensors.items() if ".base_layer." not in name}
    if len(kept) < len(tensors):
        save_file(kept, path, metadata={"format": "pt"})
