"""The leaves of an adapter, for every parametrisation and initialisation: their start, shapes and checks.

Names that begin with ``lora_`` are trained; those that begin with ``frozen_`` belong to the adapter, are saved with it,
and are not. :func:`split_frozen` takes them apart for a gradient or an optimizer, :func:`with_frozen` joins them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers import CALIBRATED, INITIALIZERS, READ_KERNEL, READ_KERNELS, embedding
from stablelora_jax.lora.pairs import FULL, TargetModule, make_target_module, pair_shapes, require_rank
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.parametrizations.lora import SHARED, Keys
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

FACTORS, FROZEN = ("lora_a", "lora_b"), "frozen_"
REDRAWN = ("frozen_seed", "frozen_first", "frozen_total")  # from which frozen parts are drawn again
Leaves = dict[str, jax.Array]


def reads_kernel(spec: LoraSpec) -> bool:
    """Whether adapters of ``spec`` start from the values of kernels, and not from their shapes alone."""
    return bool(PARAMETRIZATIONS[spec.parametrization].READS_KERNEL) or spec.init in READ_KERNEL


def reads_more(target: TargetModule, spec: LoraSpec) -> bool:
    """Whether the initialisation at ``target`` starts from something else than the kernel there."""
    paired = PARAMETRIZATIONS[spec.parametrization].PAIR
    return (spec.init in CALIBRATED or spec.init in READ_KERNELS) and not (target.looked_up and paired == "trained")


def start_leaves(
    key: jax.Array, kernel: Any, target: TargetModule, spec: LoraSpec, dtype: DTypeLike, read: Any = None
) -> Leaves:
    """The leaves of the adapter at ``target``: zero in layers that are not adapted and beyond a layer's own rank.

    Args:
      key: a PRNG key; the draw depends on it and on the names of the modules alone.
      kernel: (stack..., in, out), where :func:`reads_kernel`.
      target: the module, or stack of modules.
      spec: of the adapters.
      dtype: of the leaves.
      read: (stack..., in, out), what the initialisation starts from, where :func:`reads_more`.

    Raises:
      InputError: a rank that the initialisation or the parametrisation cannot have.
    """
    own = sorted({rank for rank in target.ranks if rank})
    if len(own) > 1 and not pads(spec):
        name = ".".join(target.path)
        raise InputError(f"{name}: with {spec.parametrization}, the layers of a stack have one rank, not {own}")
    keys = jnp.stack([jax.random.fold_in(key, zlib.crc32(name.encode())) for name in target.names])
    begin = partial(_begin, axes=_axes(target), looked_up=target.looked_up, spec=spec, dtype=dtype)
    shape, scales = jax.ShapeDtypeStruct(target.size, dtype), jnp.asarray(target.scales, dtype)
    if reads_kernel(spec) or read is not None:
        rows = _each(begin, keys, key, [kernel, read], target)
    else:
        rows = jax.vmap(lambda k, s: begin(Keys(k, key), shape, shape, target.rank, s))(keys, scales)
    used = np.arange(target.rank) < np.array(target.ranks)[:, None]  # (layers, rank)
    return {name: _masked(name, leaf, used).reshape(*target.stack, *leaf.shape[1:]) for name, leaf in rows.items()}


def leaf_shapes(target: TargetModule, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of the adapter at ``target``, ``lora_bias`` included.

    Raises:
      InputError: an embedding with a ``lora_bias``, or a rank that cannot be.
    """
    if spec.lora_bias and target.looked_up:
        raise InputError(f"{'.'.join(target.path)} is an embedding, which takes no lora_bias: leave one of them out")
    if hasattr(PARAMETRIZATIONS[spec.parametrization], "across") and not target.stack:
        name = ".".join(target.path)
        raise InputError(f"{name} is in no stack, whose layers {spec.parametrization} links: put it in exclude_modules")
    try:
        of_spec = spec.parametrization, spec.init, spec.options
        shapes = _shapes(target.size, _axes(target), target.rank, target.looked_up, *of_spec)
    except InputError as error:
        raise InputError(f"{'.'.join(target.path)}: {error}") from None
    bias = {"lora_bias": (target.size[1],)} if spec.lora_bias else {}
    return {name: (*target.stack, *shape) for name, shape in (shapes | bias).items()}


def extra_leaves(target: TargetModule, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """What ``spec`` trains at ``target`` beside a pair: shapes by name."""
    return {name: s for name, s in leaf_shapes(target, spec).items() if name not in FACTORS and not is_frozen(name)}


def trains_pairs(spec: LoraSpec) -> bool:
    """Whether an adapter of ``spec`` holds a pair that is trained."""
    return bool(PARAMETRIZATIONS[spec.parametrization].PAIR == "trained")


def subtracts_start(spec: LoraSpec) -> bool:
    """Whether adapters of ``spec`` keep their start, as frozen leaves, to subtract it from what they change."""
    return trains_pairs(spec) and any(map(is_frozen, _some_shapes(spec)))


def pads(spec: LoraSpec) -> bool:
    """Whether layers of one stack may differ in rank."""
    return spec.parametrization in ("lora", "dora")


def is_frozen(name: str) -> bool:
    """Whether the leaf of an adapter called ``name`` is not trained."""
    return name.startswith(FROZEN)


def adapter_target_modules(adapters: Any, spec: LoraSpec) -> dict[Path, TargetModule]:
    """The target modules of existing ``adapters``, where the base is not at hand.

    Where a parametrisation trains no pairs, the size of a kernel is not known without it, and is (0, 0) here.

    Raises:
      InputError: there are no adapters, or they do not have the shapes that ``spec`` gives them.
    """
    if trains_pairs(spec):
        sizes = {path: (stack, size, rank) for path, (stack, rank, size) in pair_shapes(adapters).items()}
    else:
        sizes = {path: (_stack(leaves, spec), (0, 0), 0) for path, leaves in adapter_nodes(adapters).items()}
    found = {}
    for path, (stack, size, rank) in sizes.items():
        target = make_target_module(path, stack, size, spec)
        if not target.rank:
            raise InputError(f"there are adapters at {'.'.join(path)}, which the spec does not select")
        if rank:
            require_rank(target, rank)
        found[path] = target
    return found


def adapter_nodes(adapters: Any) -> dict[Path, Mapping[str, Any]]:
    """Every dict of ``adapters`` that holds the leaves of an adapter, by path, sorted.

    Raises:
      InputError: there are none.
    """
    found = tree.find_dicts({name: node for name, node in adapters.items() if name != SHARED}, _is_adapter)
    if not found:
        raise InputError("the tree holds no adapter (no dict with leaves lora_...): make them with init_adapters")
    return found


def split_frozen(adapters: Any) -> tuple[Any, Any]:
    """``(trained, frozen)``: the adapters without the leaves that are not trained, and those alone, each at its path.

    The first is for ``jax.grad`` and optimizers. Both are the tree itself, and empty, where nothing is frozen.
    """
    if not any(is_frozen(name) for path in tree.leaves_by_path(adapters) for name in path[-1:]):
        return adapters, {}
    trained, frozen = {}, {}
    for name, node in adapters.items():
        if isinstance(node, Mapping):
            own, rest = split_frozen(node)
            trained[name], frozen[name] = own, rest
        else:
            (frozen if is_frozen(name) else trained)[name] = node
    return trained, {name: node for name, node in frozen.items() if not isinstance(node, Mapping) or node}


def with_frozen(trained: Any, frozen: Any) -> Any:
    """The inverse of :func:`split_frozen`."""
    joined = dict(trained) if frozen else trained
    for name, node in frozen.items():
        joined[name] = with_frozen(trained.get(name, {}), node) if isinstance(node, Mapping) else node
    return joined


def _axes(target: TargetModule) -> tuple[int, ...]:
    """The sizes of the axes that a kernel contracts."""
    return target.in_sizes or target.size[:1]


def _begin(
    keys: Keys,
    w: Any,
    read: Any,
    rank: int,
    scale: Any,
    *,
    axes: tuple[int, ...],
    looked_up: bool,
    spec: LoraSpec,
    dtype: DTypeLike,
) -> Leaves:
    """The leaves for one kernel ``w`` (in, out), whose initialisation starts from ``read`` (in, out)."""
    member: Any = PARAMETRIZATIONS[spec.parametrization]
    begin: Any = embedding if looked_up and member.PAIR == "trained" else INITIALIZERS[spec.init]
    arguments = spec.arguments | ({"axes": axes} if getattr(member, "READS_AXES", False) else {})
    found: Leaves = member.start(keys, w, begin(keys.own, read, rank, scale, dtype), scale, **arguments)
    return found


def _each(begin: Any, keys: jax.Array, shared: jax.Array, given: list[Any], target: TargetModule) -> Leaves:
    """The leaves of each layer at its own rank, one layer after another, padded to the rank of the stack.

    ``given`` are the kernel and what the initialisation starts from, (stack..., in, out); None: only a shape, or as the
    kernel.
    """
    shape = jax.ShapeDtypeStruct(target.size, next(x for x in given if x is not None).dtype)
    kernel, read = ([shape] * len(keys) if x is None else x.reshape(-1, *target.size) for x in given)
    read = kernel if given[1] is None else read
    ones = jnp.ones(())
    padded = jax.eval_shape(lambda k, w: begin(Keys(k, shared), w, w, target.rank, ones), keys[0], shape)
    rows = []
    for k, w, own, rank, scale in zip(keys, kernel, read, target.ranks, target.scales, strict=True):
        made = begin(Keys(k, shared), w, own, rank, jnp.asarray(scale, jnp.result_type(float))) if rank else {}
        rows.append({name: _widened(made.get(name), leaf) for name, leaf in padded.items()})
    found: Leaves = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return found


def _widened(leaf: jax.Array | None, to: Any) -> jax.Array:
    if leaf is None:
        return jnp.zeros(to.shape, to.dtype)
    return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, to.shape, strict=True)])


def _masked(name: str, leaf: jax.Array, used: np.ndarray) -> jax.Array:
    """``leaf`` (layers, ...), zero in layers and ranks that are not used."""
    if used.all():
        return leaf
    rest = leaf.ndim - 1
    keep = used.any(axis=1).reshape(-1, *(1,) * rest)
    if rest == 2 and name[-2:] in ("_a", "_b"):
        keep = used[:, None, :] if name[-2:] == "_a" else used[:, :, None]
    return jnp.where(keep, leaf, jnp.zeros((), leaf.dtype))


@lru_cache(maxsize=4096)
def _shapes(
    size: tuple[int, int],
    axes: tuple[int, ...],
    rank: int,
    looked_up: bool,
    parametrization: str,
    init: str,
    options: Any,
) -> dict[str, tuple[int, ...]]:
    """Of the leaves for one kernel."""
    if parametrization == "lora" and (looked_up or init in ("kaiming", "gaussian", "init_b", "orthogonal")):
        return {"lora_a": (size[0], rank), "lora_b": (rank, size[1])}
    spec = LoraSpec(parametrization=parametrization, init=init, options=options)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    begin = partial(_begin, rank=rank, scale=jnp.ones(()), axes=axes, looked_up=looked_up, spec=spec, dtype=jnp.float32)
    made = jax.eval_shape(lambda key, w: begin(Keys(key, key), w, w), key, jax.ShapeDtypeStruct(size, np.float32))
    return {name: leaf.shape for name, leaf in made.items()}


def _is_adapter(node: Mapping[str, Any]) -> bool:
    return any(name.startswith(("lora_", FROZEN)) and name != FULL for name in node)


def _stack(leaves: Mapping[str, Any], spec: LoraSpec) -> tuple[int, ...]:
    """The stack axes of the leaves of an adapter: those beyond the axes that the leaf has at one kernel."""
    own = _some_shapes(spec)
    name = next((name for name in sorted(own) if name in leaves), None)
    shape = jnp.shape(leaves[name]) if name else ()
    return tuple(shape[: len(shape) - len(own[name])]) if name else ()


def _some_shapes(spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Of the leaves for a kernel that every parametrisation takes."""
    width = 2 * math.lcm(64, *(value for value in spec.arguments.values() if isinstance(value, int)))
    return _shapes((width, width), (width,), 2, False, spec.parametrization, spec.init, spec.options)
