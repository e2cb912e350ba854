"""The tensors of a PEFT adapter and their positions in the adapter tree: one table for writing and for reading.

PEFT (0.21) has one tensor for each layer, under the prefix ``base_model.model.``; ours are stacked and transposed:

====================================  ======================  =============================================
PEFT                                  shape                   ours, at the module
====================================  ======================  =============================================
``<m>.lora_A.weight``, ``lora_B``     (r, in), (out, r)       ``lora_a`` (in, r), ``lora_b`` (r, out)
``<m>.lora_embedding_A``, ``_B``      (r, vocab), (D, r)      the same, for an embedding (vocab, D)
``<m>.lora_magnitude_vector``         (out,)                  ``lora_magnitude_vector`` (out,)
``<m>.lora_B.bias``                   (out,)                  ``lora_bias`` (out,)
``<m>.weight``, ``<m>.bias``          as in the base          ``lora_full``: ``modules_to_save``, ``bias="all"``
``<m>.base_layer.bias``               (out,)                  ``lora_full``: the bias of an adapted module
====================================  ======================  =============================================

Other tuners than LoRA: :mod:`~stablelora_jax.interop.peft_tuners`.

Where the head of the base is tied to its embedding, one adapter (or one trained copy) changes both. PEFT calls this
``ensure_weight_tying`` and stores the tensors twice, those of the head transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stablelora_jax.interop.peft_entry import Entry
from stablelora_jax.interop.peft_experts import expert_entries, is_experts
from stablelora_jax.interop.peft_tuners import LEAVES, shared_entries, tuner_entries
from stablelora_jax.lora.full_parameters import TrainedParameter, trained_parameters
from stablelora_jax.lora.leaves import extra_leaves
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.models.pretrained.safetensors import LEAF
from stablelora_jax.utils import tree
from stablelora_jax.utils.tree import Path

EMBEDDING, HEAD = "embed_tokens", "lm_head"


def layout(targets: Mapping[Path, TargetModule], params: Mapping[str, Any] | None, spec: LoraSpec) -> list[Any]:
    """Every tensor that PEFT stores for adapters of ``spec``: an :class:`Entry` or an ``ExpertEntry`` each.

    Args:
      targets: the adapted modules, by path.
      params: the base, or None where nothing is trained in full and no embedding is adapted.
      spec: the spec of the adapters.
    """
    single = [target for target in targets.values() if not is_experts(target, spec)]
    own = tuner_entries if spec.parametrization in LEAVES else _pair_entries
    entries: list[Any] = [entry for target in single for entry in own(target, spec)]
    entries += [*expert_entries(targets.values(), spec), *shared_entries(spec)]
    if params is None:
        return entries
    adapted = {
        name for target in targets.values() for name, rank in zip(target.names, target.ranks, strict=True) if rank
    }
    entries += [entry for leaf in trained_parameters(params, spec).values() for entry in _full_entries(leaf, adapted)]
    return entries + [twin for entry in entries if is_tied(params) for twin in _twin(entry)]


def is_tied(params: Mapping[str, Any]) -> bool:
    """Whether the base is a decoder whose head is tied to its embedding.

    Example::

        >>> is_tied({"model": {"embed_tokens": {"embedding": [[0.0]]}}})
        True
    """
    return HEAD not in params and tree.get_in(params, ("model", EMBEDDING)) is not None


def _pair_entries(target: TargetModule, spec: LoraSpec) -> Iterator[Entry]:
    a, b = (*target.stack, target.size[0], target.rank), (*target.stack, target.rank, target.size[1])
    kinds = ("lora_embedding_A", "lora_embedding_B") if target.looked_up else ("lora_A.weight", "lora_B.weight")
    for i, (name, rank) in enumerate(zip(target.names, target.ranks, strict=True)):
        if not rank:
            continue
        rows, columns, used = target.size[0], target.size[1], slice(rank)
        yield Entry(f"{name}.{kinds[0]}", (rank, rows), (*target.path, "lora_a"), a, (i, slice(None), used), True)
        yield Entry(f"{name}.{kinds[1]}", (columns, rank), (*target.path, "lora_b"), b, (i, used), True)
        for leaf, shape in extra_leaves(target, spec).items():
            kind = "lora_B.bias" if leaf == "lora_bias" else leaf
            yield Entry(f"{name}.{kind}", shape[len(target.stack) :], (*target.path, leaf), shape, (i,), False)


def _full_entries(leaf: TrainedParameter, adapted: set[str]) -> Iterator[Entry]:
    kind, transposed = leaf.path[-1], leaf.path[-1] == "kernel"
    for i, name in enumerate(leaf.names):
        owner = f"{name}.base_layer" if name in adapted else name
        shape = leaf.own[::-1] if transposed else leaf.own
        yield Entry(f"{owner}.{LEAF.get(kind, kind)}", shape, leaf.place, leaf.shape, (i,), transposed)


def _twin(entry: Entry) -> Iterator[Entry]:
    """The tensor of a tied head that belongs to an entry of the embedding."""
    module, _, kind = entry.name.partition(f"{EMBEDDING}.")
    if module != "model.":
        return
    if kind in ("lora_embedding_A", "lora_embedding_B"):
        other = {"lora_embedding_A": "lora_B.weight", "lora_embedding_B": "lora_A.weight"}[kind]
        yield entry._replace(name=f"{HEAD}.{other}", shape=entry.shape[::-1], transposed=False)
    elif kind == "weight":
        yield entry._replace(name=f"{HEAD}.weight")
