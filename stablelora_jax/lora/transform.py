"""LoRA as a transform of parameters: nested dicts in, nested dicts out, for any Flax Linen model.

``merge`` is the definition of what adapters mean; :mod:`stablelora_jax.lora.apply` computes the same without ever
forming the merged kernel. Neither knows a particular model: a module is adapted because its kernel has a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from stablelora_jax.lora.dense import changed_kernel
from stablelora_jax.lora.full_parameters import (
    apply_full_parameters,
    init_trained_parameter,
    match_trained_parameters,
    trained_parameters,
)
from stablelora_jax.lora.leaf_checks import require_leaves
from stablelora_jax.lora.leaves import (
    adapter_target_modules,
    leaf_shapes,
    reads_kernel,
    start_leaves,
)
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.plain import plain_adapters
from stablelora_jax.lora.shared import share
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.statistics import Calibration, blank_calibration, kernel_values, statistics
from stablelora_jax.lora.target_modules import (
    as_dict,
    find_target_modules,
    like,
    match_target_modules,
    target_matrix,
    with_matrix,
)
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import as_dtype, checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


@checked
def init_adapters(
    key: jax.Array,
    params: Any,
    spec: LoraSpec,
    *,
    dtype: DTypeLike = jnp.float32,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Make the adapters that ``spec`` asks for.

    A pair's draw depends on the key and its module's name alone, so a stack of layers starts as its separate layers
    would, and adapting one more module changes no other.

    Args:
      key: a PRNG key.
      params: parameters of any Linen model. Of adapted kernels only shapes are read (``jax.ShapeDtypeStruct`` will
        do), but some initialisations and parametrisations, and parameters trained in full, start from the values.
      spec: what to adapt.
      dtype: of the adapters, float32 or float64, whatever the dtype of the base: in bfloat16 a shrink by 5e-4 is
        less than half a unit in the last place, and Stable-LoRA would silently do nothing.
      calibration: of :func:`stablelora_jax.calibrate` or :func:`stablelora_jax.quantization_residual`, where the
        initialisation starts from data (``lora_ga``, ``lora_sb``, ``eva``, ``loftq``).

    Returns:
      A nested dict that mirrors ``params``: ``lora_a`` (..., in, r) and ``lora_b`` (..., r, out) at adapted modules,
      beside them what the parametrisation adds, and under ``lora_full`` what ``modules_to_save`` and ``bias`` train.

    Raises:
      InputError: a pattern matches nothing, the dtype is narrower than float32, or the calibration is missing or of
        another spec.
    """
    dtype = checked_dtype(dtype)
    require_key(key)
    params = as_dict(params)
    return make_adapters(key, params, find_target_modules(params, spec), spec, dtype, calibration)


def make_adapters(
    key: jax.Array,
    params: Mapping[str, Any],
    targets: Mapping[Path, TargetModule],
    spec: LoraSpec,
    dtype: DTypeLike,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Adapters at ``targets`` of ``params``, nested dicts, beside them what ``spec`` trains in full."""
    for target in targets.values():
        leaf_shapes(target, spec)  # refuses what cannot be
    adapters: dict[str, Any] = {}
    read = statistics(params, targets, spec, calibration)
    for path, target in targets.items():
        kernel = kernel_values(params, target, spec) if reads_kernel(spec) else None
        leaves = start_leaves(key, kernel, target, spec, dtype, read.get(path))
        bias = {"lora_bias": jnp.zeros((*target.stack, target.size[1]), dtype)} if spec.lora_bias else {}
        adapters = tree.set_in(adapters, path, leaves | bias)
    adapters = share(key, adapters, targets, spec, dtype)
    for leaf in trained_parameters(params, spec).values():
        adapters = tree.set_in(adapters, leaf.place, init_trained_parameter(params, leaf, dtype))
    return adapters


def adapter_shapes(params: Any, spec: LoraSpec) -> dict[str, Any]:
    """Shapes and dtypes of what :func:`init_adapters` makes; shapes of ``params`` will do, and no calibration."""
    params = as_dict(params)
    targets = find_target_modules(params, spec)

    def make(params: Any) -> dict[str, Any]:
        return make_adapters(jax.random.key(0), params, targets, spec, jnp.float32, blank_calibration(targets, spec))

    found: dict[str, Any] = jax.eval_shape(make, params)
    return found


@checked
def merge(params: Any, adapters: Mapping[str, Any], spec: LoraSpec, *, safe: bool = True) -> Any:
    """Parameters with the adapters folded in: ``W0 + s A B``, computed at least in float32, in the base's dtype.

    This is the definition of what adapters mean. A parameter that two modules share (an embedding that is the head,
    too) is changed for both. Adapted kernels of a quantised base come back dense, merged into what they dequantise to:
    that is the model that was trained. The others stay quantised (see :func:`.dequantize_tree`).

    Args:
      params: the base; not changed.
      adapters: as made by :func:`init_adapters` for ``spec``.
      spec: the spec of the adapters.
      safe: refuse a kernel that holds NaN or infinity (PEFT's ``safe_merge``). Values are not known while tracing, so
        inside ``jit`` or ``grad`` this check is not made.

    Raises:
      InputError: adapters that do not fit the parameters or the spec; a kernel that is not finite (``safe``).
    """
    nested = as_dict(params)
    leaves = match_trained_parameters(nested, adapters, spec)
    targets = match_target_modules(nested, adapters, spec)
    whole = apply_full_parameters(nested, adapters, leaves, cast=True)
    return like(params, fold(whole, adapters, targets, spec, +1.0, safe))


@checked
def unmerge(params: Any, adapters: Mapping[str, Any], spec: LoraSpec, *, safe: bool = True) -> Any:
    """The inverse of :func:`merge` up to rounding: keep the base itself where bits matter.

    Raises:
      InputError: as :func:`merge`; or the base cannot be had back (DoRA, parameters trained in full).
    """
    if spec.parametrization != "lora" or spec.modules_to_save or spec.bias != "none":
        raise InputError("only plain pairs can be taken out of merged parameters: keep the base itself")
    return _fold(params, adapters, spec, -1.0, safe)


@checked
def lora_hyperparams(spec: LoraSpec, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers a sweep varies, as arrays: ``lora_scale`` and ``lora_dropout`` at every adapted module.

    Pass the tree, changed or not, as the collection ``lora_hp`` of ``adapted(model, spec).apply`` to have them traced:
    another alpha or dropout rate then needs no new compilation. Scales have the shape of the stack axes.
    """
    numbers: dict[str, Any] = {}
    for path, target in adapter_target_modules(adapters, spec).items():
        rate = jnp.full(target.stack, spec.dropout, jnp.result_type(float))
        numbers = tree.set_in(numbers, path, {"lora_scale": target.scale(), "lora_dropout": rate})
    return numbers


def lora_scales(numbers: Any) -> Any:
    """The LoRA scale of each pair, as optimizers take it, from what :func:`lora_hyperparams` gives."""
    if "lora_scale" in numbers:
        return numbers["lora_scale"]
    return {name: lora_scales(node) for name, node in numbers.items()}


def checked_dtype(dtype: DTypeLike) -> Any:
    """``dtype`` as one that adapters may have.

    Raises:
      InputError: it is narrower than float32, or not enabled.
    """
    dtype = as_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise InputError(f"adapters are float32 or wider, not {jnp.dtype(dtype).name}")
    if jnp.dtype(dtype).itemsize > 4 and not jax.config.read("jax_enable_x64"):
        raise InputError("float64 adapters need jax.config.update('jax_enable_x64', True)")
    return dtype


def require_key(key: jax.Array) -> None:
    """Check that ``key`` is one PRNG key.

    Raises:
      InputError: it is not.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not (typed and key.shape == ()) and not (key.dtype == jnp.uint32 and key.ndim == 1 and key.shape[0] in (2, 4)):
        raise InputError(f"key must be one PRNG key, such as jax.random.key(0), not {key.dtype} {key.shape}")


def _fold(params: Any, adapters: Any, spec: LoraSpec, sign: float, safe: bool) -> Any:
    nested = as_dict(params)
    return like(params, fold(nested, adapters, match_target_modules(nested, adapters, spec), spec, sign, safe))


def fold(
    params: dict[str, Any], adapters: Any, targets: Mapping[Path, TargetModule], spec: LoraSpec, sign: float, safe: bool
) -> dict[str, Any]:
    """``params``, nested dicts, with ``sign`` times the change of each pair added at ``targets``."""
    require_leaves(targets, adapters, spec)
    adapters = plain_adapters(adapters, targets, spec)
    for path, target in targets.items():
        pair = tree.get_in(adapters, path)
        matrix = target_matrix(params, target)
        merged = changed_kernel(matrix, pair, sign * target.scale(), spec)
        if safe:
            _require_finite(merged, target)
        params = with_matrix(params, target, merged)
        if "lora_bias" in pair:
            bias = _with_lora_bias(params, pair["lora_bias"], sign * target.scale(), target)
            params = tree.set_in(params, (*path, "bias"), bias)
    return params


def _with_lora_bias(params: Any, lora_bias: jax.Array, scale: jax.Array, target: TargetModule) -> jax.Array:
    bias = tree.get_in(params, (*target.path, "bias"))
    if bias is None:
        raise InputError(
            f"{'.'.join(target.path)} has no bias that its lora_bias could be merged into: keep them apart"
        )
    accum_dtype = jnp.promote_types(jnp.promote_types(bias.dtype, lora_bias.dtype), jnp.float32)
    change = lora_bias.astype(accum_dtype) * scale.astype(accum_dtype)[..., None]
    found: jax.Array = (bias.astype(accum_dtype) + change.reshape(bias.shape)).astype(bias.dtype)
    return found


def _require_finite(merged: jax.Array, target: TargetModule) -> None:
    if isinstance(merged, jax.core.Tracer):
        return
    finite = np.asarray(jnp.isfinite(merged).all(axis=(-2, -1))).reshape(-1)
    if not finite.all():
        name = target.names[int(np.argmin(finite))]
        raise InputError(f"merging {name} gives NaN or infinity; pass safe=False to merge nevertheless")
