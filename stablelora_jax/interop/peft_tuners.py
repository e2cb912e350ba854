"""The tensors of PEFT's other tuners (0.21), VeRA, RandLoRA, MiSS, AdaLoRA, SHiRA, VB-LoRA, as leaves of ours.

===========================================  ==============================  =========================================
PEFT                                         shape                           ours, at the module
===========================================  ==============================  =========================================
``<m>.vera_lambda_d``, ``vera_lambda_b``     (r,), (out,)                    ``lora_lambda_d``, ``lora_lambda_b``
``vera_A``, ``vera_B``, of the whole model   (r, IN), (OUT, r)               parts: ``frozen_a`` and ``frozen_b``
``<m>.randlora_lambda``, ``randlora_gamma``  (r, n), (n, p)                  ``lora_lambda``, ``lora_gamma``
``randlora_A``, ``randlora_B``, likewise     (r, 1, P), (Q, N, r)            parts: ``frozen_thin`` and ``frozen_wide``
``<m>.miss_block``                           (r, out), (r, mini_r)           ``lora_d``
``<m>.miss_block``, of Bat                   (out / r, r, r)                 ``lora_blocks``
``<m>.shira_weight``, ``shira_indices``      (n,), (2, n): out, in           ``lora_values``, ``frozen_index``: flat
``<m>.vblora_logits_A``                      (r, in / l, h)                  ``lora_logits_a``
``<m>.vblora_logits_B``                      (out / l, r, h)                 ``lora_logits_b``, axes exchanged
``vblora_vector_bank``, of the whole model   (h, l)                          ``lora_shared.lora_bank``
``<m>.lora_A``, ``lora_B``, ``lora_E``       (r, in), (out, r), (r, 1)       ``lora_a``, ``lora_b``, ``lora_e``
===========================================  ==============================  =========================================

What is of the whole model is as large as the largest kernel in either direction; a module has its first rows and
columns, of RandLoRA's B with its last two axes as one, which PEFT multiplies as they lie. A module's part is called
``<m>.vera_A`` in :func:`tuner_entries`; :func:`read_tensors` makes parts of a file's tensors, :func:`write_tensors` the
reverse. AdaLoRA's file leaves out what its schedule has pruned, which ``rank_pattern`` tells; here it is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stablelora_jax.interop.peft_entry import Entry
from stablelora_jax.lora.leaves import leaf_shapes
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.parametrizations.lora import SHARED as SHARED_LEAVES
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils.errors import InputError

Tensors = dict[str, np.ndarray]
LEAVES = {  # of each parametrisation: PEFT's tensor, our leaf, whether one is the other transposed
    "vera": (
        ("vera_lambda_d", "lora_lambda_d", False),
        ("vera_lambda_b", "lora_lambda_b", False),
        ("vera_A", "frozen_a", True),
        ("vera_B", "frozen_b", True),
    ),
    "randlora": (
        ("randlora_lambda", "lora_lambda", False),
        ("randlora_gamma", "lora_gamma", False),
        ("randlora_A", "frozen_thin", False),
        ("randlora_B", "frozen_wide", False),
    ),
    "miss": (("miss_block", "lora_d", False),),
    "bat": (("miss_block", "lora_blocks", False),),
    "miss_mini": (("miss_block", "lora_d", False),),
    "shira": (("shira_weight", "lora_values", False), ("shira_indices", "frozen_index", False)),
    "vblora": (("vblora_logits_A", "lora_logits_a", False), ("vblora_logits_B", "lora_logits_b", False)),
    "adalora": (("lora_A", "lora_a", True), ("lora_B", "lora_b", True), ("lora_E", "lora_e", False)),
}
SHARED = {"vera": ("vera_A", "vera_B"), "randlora": ("randlora_A", "randlora_B")}
BANK = "vblora_vector_bank"
SHARED_NAMES = (*(name for names in SHARED.values() for name in names), BANK)
REORDERED = ("shira", "vblora")
ADDED = 1e-5  # by AdaLoRA to the rank that it divides by


def tuner_entries(target: TargetModule, spec: LoraSpec) -> Iterator[Entry]:
    """Every tensor of the adapter at ``target``, one of :data:`LEAVES`' parametrisations.

    Raises:
      InputError: PEFT adapts no embedding so.
    """
    if target.looked_up:
        raise InputError(f"{'.'.join(target.path)}: PEFT has no {spec.parametrization} for an embedding")
    shapes = leaf_shapes(target, spec) | _base_shapes(target, spec)
    for i, (name, rank) in enumerate(zip(target.names, target.ranks, strict=True)):
        for kind, leaf, transposed in LEAVES[spec.parametrization] if rank else ():
            own = shapes[leaf][len(target.stack) :]
            shape = own[::-1] if transposed else own
            yield Entry(f"{name}.{kind}", shape, (*target.path, leaf), shapes[leaf], (i,), transposed)


def shared_entries(spec: LoraSpec) -> Iterator[Entry]:
    """The tensors of what modules share here too: VB-LoRA's bank."""
    if spec.parametrization == "vblora":
        shape = (spec.arguments["vectors"], spec.arguments["length"])
        yield Entry(BANK, shape, (SHARED_LEAVES, "lora_bank"), shape, (0,), False)


def _base_shapes(target: TargetModule, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Of the random factors that an adapter of PEFT's carries."""
    (rows, columns), rank, stack = target.size, target.rank, target.stack
    small = min(rows, columns)
    return {
        "vera": {"frozen_a": (*stack, rows, rank), "frozen_b": (*stack, rank, columns)},
        "randlora": {
            "frozen_thin": (*stack, rank, small),
            "frozen_wide": (*stack, max(rows, columns), rank * math.ceil(small / rank)),
        },
    }.get(spec.parametrization, {})


def read_tensors(
    raw: Mapping[str, Any],
    tensors: Tensors,
    entries: Sequence[Entry],
    targets: Iterable[TargetModule],
    spec: LoraSpec,
    source: str,
) -> Tensors:
    """The tensors of a file by the names and in the shapes of ``entries``; of LoRA and MiSS as they are.

    Raises:
      InputError: the file lacks the random factors, ``rank_pattern`` does not fit its tensors, or an index is outside
        of its kernel.
    """
    if spec.parametrization == "adalora":
        return _unpruned(raw, tensors, entries, spec, source)
    found = dict(tensors)
    for kind in SHARED.get(spec.parametrization, ()):
        if kind not in found:
            raise InputError(f"{source} lacks {kind}, which only PyTorch could draw: save it with save_projection=True")
        whole = found.pop(kind)
        whole = whole.reshape(whole.shape[0], -1)
        found = {name: tensor for name, tensor in found.items() if not name.endswith(f".{kind}")}  # PEFT's copies
        for entry in (entry for entry in entries if entry.name.endswith(f".{kind}")):
            found[entry.name] = whole[: entry.shape[0], : entry.shape[1]]
    if spec.parametrization in REORDERED:
        sizes = {name: target.size for target in targets for name in target.names}
        return _reordered(found, sizes, read=True, source=source)
    return found


def write_tensors(
    tensors: Tensors, entries: Sequence[Entry], targets: Iterable[TargetModule], spec: LoraSpec
) -> tuple[Tensors, dict[str, Any]]:
    """The inverse of :func:`read_tensors`: a file's tensors, and what its configuration says beside the spec.

    Raises:
      InputError: modules whose random factors are not parts of one whole, as PEFT's are.
    """
    targets = list(targets)
    if spec.parametrization == "adalora":
        return _pruned(tensors, spec)
    found = dict(tensors)
    for kind in SHARED.get(spec.parametrization, ()):
        parts = {entry.name: found.pop(entry.name) for entry in entries if entry.name.endswith(f".{kind}")}
        shape = _whole_shape(kind, [target.size for target in targets if target.rank], spec.rank)
        found[kind] = _joined(parts, (shape[0], math.prod(shape[1:]))).reshape(shape)
    if spec.parametrization in REORDERED:
        return _reordered(found, {name: target.size for target in targets for name in target.names}), {}
    ternary = "randlora_B" in found and len(np.unique(found["randlora_B"])) <= 3
    return found, {"sparse": True} if ternary else {}  # PEFT holds others in bfloat16


def _reordered(
    tensors: Tensors, sizes: Mapping[str, tuple[int, int]], *, read: bool = False, source: str = ""
) -> Tensors:
    """SHiRA's indices, flat here and (2, n) there, and VB-LoRA's logits of B, whose first two axes are exchanged."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "vblora_logits_B" and tensor.ndim == 3:
            found[name] = np.ascontiguousarray(tensor.swapaxes(0, 1))
        elif kind == "shira_indices" and module in sizes:
            rows, columns = sizes[module]
            found[name] = (
                _flat(tensor, rows, columns, f"{source}: {name}")
                if read
                else np.stack([tensor % columns, tensor // columns]).astype(np.int32)
            )
    return found


def _flat(index: np.ndarray, rows: int, columns: int, name: str) -> np.ndarray:
    """Places (2, n) in the weight (out, in) as places in the flat kernel ``(rows, columns)``."""
    if index.ndim != 2 or len(index) != 2 or not np.isfinite(index).all():
        raise InputError(f"{name} has shape {index.shape}; it must be (2, n) places in the weight")
    index = index.astype(np.int32)  # PEFT writes float32 on Windows
    if (index < 0).any() or (index >= np.array([[columns], [rows]])).any():
        raise InputError(f"{name} has a place outside of the weight {(columns, rows)}")
    flat: np.ndarray = index[1] * columns + index[0]
    return flat


def _whole_shape(kind: str, sizes: Sequence[tuple[int, int]], rank: int) -> tuple[int, ...]:
    rows, columns = (max(side) for side in zip(*sizes, strict=True))
    large, small = max(rows, columns), min(rows, columns)
    return {
        "vera_A": (rank, rows),
        "vera_B": (columns, rank),
        "randlora_A": (rank, 1, small),
        "randlora_B": (large, math.ceil(small / rank), rank),
    }[kind]


def _joined(parts: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The matrix whose first rows and columns are each of ``parts``; zero where none is."""
    whole = np.full(shape, np.nan, next(iter(parts.values())).dtype)
    for name, part in parts.items():
        place = whole[: part.shape[0], : part.shape[1]]
        if not np.array_equal(np.where(np.isnan(place), part, place), part):
            raise InputError(f"{name} is not a part of what other modules have, as in PEFT: leave peft_type out")
        place[...] = part
    return np.nan_to_num(whole)


def _unpruned(
    raw: Mapping[str, Any], tensors: Tensors, entries: Sequence[Entry], spec: LoraSpec, source: str
) -> Tensors:
    """AdaLoRA's tensors at the rank that training began with, and E as ours is beside the scale ``alpha / r``."""
    masks, rank = raw.get("rank_pattern") or {}, spec.rank
    if not isinstance(masks, Mapping):
        raise InputError(f"{source}: rank_pattern must map modules to masks, not {masks!r:.80}")
    found = dict(tensors)
    for name in (entry.name for entry in entries if entry.name in tensors):
        tensor, (module, _, kind) = tensors[name], name.rpartition(".")
        mask, axis = np.array(masks.get(f"{module}.lora_E", [True] * rank)), int(kind == "lora_B")
        if mask.shape != (rank,) or mask.dtype != bool:
            raise InputError(f"{source}: rank_pattern must have {rank} times true or false for {module}.lora_E")
        if kind == "lora_E" and tensor.shape[1:] == (1,):
            tensor = tensor[:, 0].astype(np.promote_types(tensor.dtype, np.float32)) * (rank / (rank + ADDED))
        if tensor.ndim > axis and tensor.shape[axis] == mask.sum() and not mask.all():
            shape = list(tensor.shape)
            shape[axis] = rank
            kept, tensor = tensor, np.zeros(shape, tensor.dtype)
            tensor[(slice(None),) * axis + (mask,)] = kept
        found[name] = tensor
    return found


def _pruned(tensors: Tensors, spec: LoraSpec) -> tuple[Tensors, dict[str, Any]]:
    """The inverse: ranks at which all is zero are left out, and ``rank_pattern`` says which are not."""
    found: Tensors = {}
    masks = {}
    for module in {name.rpartition(".")[0] for name in tensors if name.endswith(".lora_E")}:
        a, b, e = (tensors[f"{module}.lora_{kind}"] for kind in "ABE")
        used = a.any(axis=1) | b.any(axis=0) | (e != 0)
        if not used.all():
            masks[f"{module}.lora_E"] = used.tolist()
        e = e[:, None] * ((spec.rank + ADDED) / spec.rank)
        own = {"lora_A": a[used], "lora_B": b[:, used], "lora_E": e.astype(a.dtype)[used]}
        found |= {f"{module}.{kind}": np.ascontiguousarray(tensor) for kind, tensor in own.items()}
    return {**tensors, **found}, {"rank_pattern": masks or None, "target_r": spec.rank}
