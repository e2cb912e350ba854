"""What an initialisation starts from where it is not the kernel itself: all kernels of a kind, or a calibration.

A calibration is a nested dict that mirrors the parameters, with one array (stack..., in, out) at each adapted module,
under the name that ``CALIBRATED`` gives it: ``{"q_proj": {"gradient": (L, in, out)}}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.initializers import CALIBRATED, READ_KERNEL, READ_KERNELS
from stablelora_jax.lora.initializers.cora import common
from stablelora_jax.lora.leaves import reads_more
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import target_matrix
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

Calibration = Mapping[str, Any]
HOW = {"residual": "quantization_residual(full, params, spec)"}  # of a calibration; else calibrate


def statistics(
    params: Mapping[str, Any], targets: Mapping[Path, TargetModule], spec: LoraSpec, calibration: Calibration | None
) -> dict[Path, jax.Array]:
    """What the initialisation of ``spec`` starts from, (stack..., in, out), at those of ``targets`` that need it.

    Raises:
      InputError: a calibration that is missing, has no meaning for ``spec``, or is of other modules.
    """
    if calibration is not None and spec.init not in CALIBRATED:
        raise InputError(f"init={spec.init!r} takes no calibration: leave it out")
    wanted = {path: target for path, target in targets.items() if reads_more(target, spec)}
    if spec.init in READ_KERNELS:
        return _common(params, wanted, spec)
    if wanted and calibration is None:
        how = HOW.get(CALIBRATED[spec.init], "calibrate(adapted(model, spec), params, batches, loss)")
        raise InputError(f"init={spec.init!r} starts from data: pass calibration={how} on")
    return {path: _found(calibration, target, spec) for path, target in wanted.items()}


def blank_calibration(targets: Mapping[Path, TargetModule], spec: LoraSpec) -> dict[str, Any] | None:
    """A calibration of zeros, where only the structure of adapters counts; None where ``spec`` takes none."""
    if spec.init not in CALIBRATED:
        return None
    found: dict[str, Any] = {}
    for path, target in targets.items():
        found = tree.set_in(found, path, {CALIBRATED[spec.init]: jnp.zeros((*target.stack, *target.size))})
    return found


def kernel_values(params: Any, target: TargetModule, spec: LoraSpec) -> jax.Array:
    """The kernel of ``target`` as a matrix (stack..., in, out).

    Raises:
      InputError: ``params`` hold its shape alone.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree.get_in(params, target.leaf_path))):
        own = spec.init in (*READ_KERNEL, *READ_KERNELS)
        what = f"init {spec.init!r}" if own else spec.parametrization
        raise InputError(f"{what} starts from the values of {'.'.join(target.path)}, not only its shape")
    return target_matrix(params, target)


def _common(params: Mapping[str, Any], targets: Mapping[Path, TargetModule], spec: LoraSpec) -> dict[Path, jax.Array]:
    """Of modules whose paths differ in numbers alone, which are layers of one kind, what they have in common."""
    kinds: dict[Any, list[Path]] = {}
    for path, target in targets.items():
        kind = (tuple(re.sub(r"\d+", "", part) for part in path), target.size)
        kinds.setdefault(kind, []).append(path)
    found: dict[Path, jax.Array] = {}
    for paths in kinds.values():
        shared = common([kernel_values(params, targets[path], spec) for path in paths])
        found |= {path: jnp.broadcast_to(shared, (*targets[path].stack, *shared.shape)) for path in paths}
    return found


def _found(calibration: Any, target: TargetModule, spec: LoraSpec) -> jax.Array:
    name, own = CALIBRATED[spec.init], tree.get_in(calibration, target.path) or {}
    shape = (*target.stack, *target.size)
    if name not in own or jnp.shape(own[name]) != shape:
        raise InputError(
            f"init={spec.init!r} needs {name!r} of shape {shape} at {'.'.join(target.path)}; the calibration holds "
            f"{ {key: jnp.shape(leaf) for key, leaf in own.items()} or 'nothing' } there: make it for this spec"
        )
    return jnp.asarray(own[name])
