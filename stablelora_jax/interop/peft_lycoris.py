"""PEFT's LoHa and LoKr (0.21), read as the LoRA that they are.

LoHa's Hadamard product ``(w1_a w1_b) * (w2_a w2_b)`` of two products of rank r is one of rank r^2: its factors have the
products of all pairs of columns, and of rows (the face-splitting product; FedPara, arXiv 2108.06098, Proposition 1).
LoKr's Kronecker product ``(a b) x (c d)`` is ``(a x c) (b x d)`` (LyCORIS, arXiv 2309.14859). A factor that is not
decomposed is a product with an identity, on its smaller side. Both are exact, of no rank above that of the kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from stablelora_jax.lora.names import first_match
from stablelora_jax.utils.errors import InputError

Tensors = dict[str, np.ndarray]
PREFIXES = {"LOHA": "hada_", "LOKR": "lokr_"}
DROPPED = "peft_type r alpha rank_pattern alpha_pattern init_weights use_effective_conv2d decompose_both".split()
DROPPED += "decompose_factor rank_dropout_scale rank_dropout module_dropout".split()  # of training alone


def as_lora_file(raw: Mapping[str, Any], tensors: Tensors, source: str) -> tuple[Mapping[str, Any], Tensors]:
    """The configuration and the tensors of a LoRA with the same function; those of another tuner as they are.

    Args:
      raw: of ``adapter_config.json``.
      tensors: by name, without the prefix.
      source: the file, for messages.

    Raises:
      InputError: a module's tensors do not make a linear layer's change, or patterns are no numbers.
    """
    prefix = PREFIXES.get(str(raw.get("peft_type")))
    if prefix is None:
        return raw, tensors
    modules: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind.startswith(prefix):
            modules.setdefault(module, {})[kind.removeprefix(prefix)] = tensor
    found = {name: tensor for name, tensor in tensors.items() if not name.rpartition(".")[2].startswith(prefix)}
    sizes: dict[str, tuple[int, float]] = {}  # rank and alpha
    for module, own in modules.items():
        try:
            b, a = _loha(dict(own)) if prefix == "hada_" else _lokr(dict(own))
        except (KeyError, ValueError):
            shapes = ", ".join(f"{prefix}{kind} {tensor.shape}" for kind, tensor in sorted(own.items()))
            raise InputError(f"{source}: {module} of {shapes} is no change of a linear layer") from None
        found |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        sizes[module] = (len(a), _number(raw, "alpha", module) / _number(raw, "r", module) * len(a))
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0] if sizes else (1, 1.0)
    others = {module: own for module, own in sizes.items() if own != (rank, alpha)}
    rest = {key: value for key, value in raw.items() if key not in DROPPED}
    patterns = {f"{key}_pattern": {n: own[i] for n, own in others.items()} for i, key in enumerate(("rank", "alpha"))}
    return {**rest, "peft_type": "LORA", "r": rank, "lora_alpha": alpha, **patterns}, found


def _number(raw: Mapping[str, Any], key: str, module: str) -> float:
    """PEFT's rule: the first pattern that matches the module, else the value for all."""
    patterns = raw.get("rank_pattern" if key == "r" else "alpha_pattern") or {}
    value = first_match(tuple(patterns.items()), module, raw.get(key, 8)) if isinstance(patterns, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise InputError(f"{key} of {module} must be a positive number, not {value!r:.80}")
    return value


def _loha(own: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """``B`` (out, k) and ``A`` (k, in)."""
    w1_a, w1_b, w2_a, w2_b = (_wide(own.pop(kind)) for kind in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if own or (w1_a @ w1_b).shape != (w2_a @ w2_b).shape:
        raise ValueError
    b = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(len(w1_a), -1)
    a = (w1_b[:, None, :] * w2_b[None, :, :]).reshape(-1, w1_b.shape[1])
    return (b, a) if len(a) <= min(len(b), a.shape[1]) else _pair(b @ a)


def _lokr(own: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """``B`` (out, k) and ``A`` (k, in)."""
    factors = []
    for kind in ("w1", "w2"):
        if kind in own:
            factors.append(_pair(_wide(own.pop(kind))))
        else:
            factors.append((_wide(own.pop(f"{kind}_a")), _wide(own.pop(f"{kind}_b"))))
    (b1, a1), (b2, a2) = factors
    if own or b1.shape[1] != len(a1) or b2.shape[1] != len(a2):
        raise ValueError
    b, a = np.kron(b1, b2), np.kron(a1, a2)
    return (b, a) if len(a) <= min(len(b), a.shape[1]) else _pair(b @ a)


def _pair(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``w`` (m, n) as a product of rank min(m, n)."""
    eye = np.eye(min(w.shape), dtype=w.dtype)
    return (w, eye) if w.shape[0] >= w.shape[1] else (eye, w)


def _wide(tensor: np.ndarray) -> np.ndarray:
    if tensor.ndim != 2:
        raise ValueError
    return tensor.astype(np.promote_types(tensor.dtype, np.float32))
