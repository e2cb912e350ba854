"""What initialisations from data start from: gradients of kernels, principal axes of inputs, errors of quantisation.

::

    lora = adapted(model, LoraSpec(init="lora_ga"))
    found = calibrate(lora, params, batches, loss)              # loss(lora, {"params": params}, batch) -> scalar
    adapters = lora.init(key, params, *example, calibration=found)

Gradients are taken with respect to the adapted kernels alone, one batch after another, and summed. Inputs are measured
inside the model (:mod:`stablelora_jax.lora.probes`) as the second moments of ``[x, 1]``, (in + 1, in + 1) a module,
which add up over batches and devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.apply import Adapted
from stablelora_jax.lora.initializers import CALIBRATED
from stablelora_jax.lora.leaves import reads_more
from stablelora_jax.lora.pairs import TargetModule, make_target_module
from stablelora_jax.lora.probes import tap, token_weights
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import as_dict, find_target_modules, like, own_params, target_matrix, to_matrix
from stablelora_jax.lora.transform import make_adapters
from stablelora_jax.quantization import dequantize, dequantize_tree, is_quantized
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.singular import decomposed
from stablelora_jax.utils.tree import Path

Loss = Callable[[Adapted, Mapping[str, Any], Any], jax.Array]
Targets = Mapping[Path, TargetModule]
Sums = dict[Path, jax.Array]


@checked
def calibrate(
    lora: Adapted,
    params: Any,
    batches: Iterable[Any],
    loss: Callable[..., Any],
    *args: Any,
    learning_rate: float | None = None,
    token_mask: Callable[[Any], Any] | None = None,
    one_at_a_time: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """What the initialisation of ``lora.spec`` starts from, measured on ``batches``.

    Args:
      lora: the adapted model; its spec says what is measured and where.
      params: of the base.
      batches: of any kind that ``loss`` takes, trees of arrays; batches of one shape are compiled once.
      loss: ``(lora, variables, batch) -> scalar``, the mean loss of a batch as training takes it, computed with
        ``lora.apply(variables, ...)``; :func:`stablelora_jax.summed_loss` divided by its number of loss tokens is one.
        For ``eva`` any scalar that the modules' outputs lead to will do.
      *args: example arguments of the model, as for ``lora.init``; needed where names and shapes do not tell its leaves.
      learning_rate: of the first step, for ``lora_sb``.
      token_mask: gives of a batch which tokens count, (B, T), nonzero where they do, for ``eva``; None: all do. It acts
        on modules whose input begins with the axes (B, T).
      one_at_a_time: measure one module, or stack of layers, after another: less memory, and as many passes.
      **kwargs: of the model, as for ``lora.init``.

    Returns:
      A nested dict that mirrors ``params``, for ``init_adapters(..., calibration=)`` or ``lora.init``. At each module
      it has ``gradient``, ``update`` or ``inputs`` (stack..., in, out), float32 or wider; beside ``inputs`` the
      ``variance`` (stack...) of all inputs, of which the squares of the columns' norms are shares.

    Raises:
      InputError: an initialisation that does not start from batches, no batches, a learning rate that is missing, or
        values that are not finite.
    """
    require_measurable(lora.spec, learning_rate)
    targets = lora.targets(params, *args, **kwargs) if args or kwargs else find_target_modules(params, lora.spec)
    wanted = {path: target for path, target in targets.items() if reads_more(target, lora.spec)}
    batches = list(batches)
    found: Sums = {}
    if not batches:
        raise InputError("calibrate needs at least one batch")
    for group in [{path: target} for path, target in wanted.items()] if one_at_a_time else [wanted]:
        measure = jax.jit(partial(measured, lora, loss, targets=group, token_mask=token_mask))
        sums = measure(params, batches[0])
        for batch in batches[1:]:
            sums = jax.tree.map(jnp.add, sums, measure(params, batch))
        found |= sums
    return finished(found, len(batches), wanted, lora.spec, learning_rate)


def require_measurable(spec: LoraSpec, learning_rate: float | None) -> None:
    """Check that adapters of ``spec`` start from what batches tell.

    Raises:
      InputError: they do not.
    """
    kind = CALIBRATED.get(spec.init)
    if kind is None:
        raise InputError(f"init={spec.init!r} starts from no data: call init_adapters without a calibration")
    if kind == "residual":
        raise InputError(f"init={spec.init!r} starts from no batches: call quantization_residual(full, params, spec)")
    if kind == "update" and learning_rate is None:
        raise InputError(f"init={spec.init!r} starts at the first step: give calibrate the learning_rate of it")


def measured(lora: Adapted, loss: Loss, params: Any, batch: Any, *, targets: Targets, token_mask: Any = None) -> Sums:
    """What one batch adds to the sums: gradients (stack..., in, out), or second moments (stack..., in + 1, in + 1)."""
    if CALIBRATED[lora.spec.init] == "inputs":
        return _moments(lora, loss, params, batch, targets, None if token_mask is None else token_mask(batch))
    return _gradients(lora, loss, params, batch, targets)


def finished(
    sums: Mapping[Path, Any], batches: int, targets: Targets, spec: LoraSpec, learning_rate: float | None
) -> dict[str, Any]:
    """The calibration of ``spec`` from the sums of ``batches`` batches.

    Raises:
      InputError: values that are not finite, or a module that no input has reached.
    """
    kind = CALIBRATED[spec.init]
    found: dict[str, Any] = {}
    for path, total in sums.items():
        if not bool(jnp.isfinite(total).all()):
            raise InputError(f"{'.'.join(path)}: what the batches give is not finite: look at params and batches")
        if kind == "inputs":
            node = _principal(jnp.asarray(total), targets[path])
        elif kind == "update":
            node = {kind: -(learning_rate or 0.0) * jnp.sign(total)}
        else:
            node = {kind: jnp.asarray(total) / batches}
        found = tree.set_in(found, path, node)
    return found


@checked
def quantization_residual(full: Any, params: Any, spec: LoraSpec) -> dict[str, Any]:
    """What quantisation took from the kernels that ``spec`` selects, for ``init="loftq"``.

    Args:
      full: the parameters before quantisation.
      params: the same, quantised, as :func:`stablelora_jax.load_pretrained` with ``quantize`` gives them.
      spec: of the adapters.

    Returns:
      A nested dict that mirrors ``params``, for ``init_adapters(..., calibration=)``: ``residual`` (stack..., in, out),
      at least float32, at each module.

    Raises:
      InputError: a selected kernel that is not quantised, or is so in ``full``, too, or of another shape there.
    """
    full, params = as_dict(full), as_dict(params)
    found: dict[str, Any] = {}
    for path, target in find_target_modules(params, spec).items():
        if target.looked_up:
            continue
        name, (was, is_) = ".".join(path), (tree.get_in(node, target.leaf_path) for node in (full, params))
        if not is_quantized(is_):
            raise InputError(f"{name} is not quantised, so that it has no residual: leave it out of target_modules")
        if was is None or is_quantized(was) or was.shape != is_.shape:
            raise InputError(f"{name}: full must hold the kernel {is_.shape} as it was before it was quantised")
        exact, own = target_matrix(full, target), dequantize(is_, jnp.dtype(jnp.float32))
        wide = jnp.promote_types(exact.dtype, jnp.float32)
        rounded = to_matrix(own, len(target.stack), target.in_axes).astype(wide)
        found = tree.set_in(found, path, {"residual": exact.astype(wide) - rounded})
    return found


def _gradients(lora: Adapted, loss: Loss, params: Any, batch: Any, targets: Targets) -> Sums:
    own = own_params(params)
    nested = as_dict(own)
    kernels = {path: dequantize_tree(tree.get_in(nested, target.leaf_path)) for path, target in targets.items()}

    def of(kernels: Mapping[Path, jax.Array]) -> jax.Array:
        whole = nested
        for path, kernel in kernels.items():
            whole = tree.set_in(whole, targets[path].leaf_path, kernel)
        return loss(lora, {"params": like(own, whole)}, batch)

    found = {}
    for path, gradient in jax.grad(of)(kernels).items():
        matrix = target_matrix(tree.set_in({}, targets[path].leaf_path, gradient), targets[path])
        found[path] = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    return found


def _moments(lora: Adapted, loss: Loss, params: Any, batch: Any, targets: Targets, token_mask: Any) -> Sums:
    """Of the inputs of each module; the model computes what its base computes, since B is zero."""
    plain: dict[str, Any] = {"parametrization": "lora", "init": "kaiming", "rank": 1, "options": {}}
    spec = replace(lora.spec, **plain, rank_pattern={}, dropout=0.0, lora_bias=False)
    remade = {path: _remade(target, spec) for path, target in (lora.found or targets).items()}
    own = own_params(params)
    everywhere = remade if lora.found else find_target_modules(as_dict(own), spec)
    observing = replace(
        lora, spec=spec, observe=partial(_observe, token_mask), found=dict(remade) if lora.found else {}
    )
    dtype = jnp.result_type(float)
    pairs = make_adapters(jax.random.key(0), as_dict(own), everywhere, spec, dtype)
    probes = {path: jnp.zeros((*t.stack, t.size[0] + 1, t.size[0] + 1), dtype) for path, t in targets.items()}

    def of(probes: Mapping[Path, jax.Array]) -> jax.Array:
        adapters = pairs
        for path, probe in probes.items():
            adapters = tree.set_in(adapters, (*path, "lora_probe"), probe)
        return loss(observing, {"params": params, "lora": adapters}, batch)

    found: Sums = jax.grad(of)(probes)
    return found


def _remade(target: TargetModule, spec: LoraSpec) -> TargetModule:
    """``target`` as ``spec`` has it."""
    made = make_target_module(
        target.path, target.stack, target.size, spec, target.leaf, target.in_axes, target.looked_up
    )
    return made._replace(stack_axes=target.stack_axes)


def _observe(token_mask: Any, y: jax.Array, own: Mapping[str, jax.Array], down: Callable[..., jax.Array]) -> jax.Array:
    """The output of a module as it is, with the second moments of ``[x, 1]`` as the gradient of its probe."""
    if "lora_probe" not in own:
        return y
    probe = own["lora_probe"]
    x = jax.lax.stop_gradient(down(jnp.eye(probe.shape[-1] - 1, dtype=probe.dtype)))
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1).astype(probe.dtype)
    weighted = x * token_weights(x.shape[:-1], token_mask, x.dtype)[..., None]
    size = x.shape[-1]
    moments = jnp.matmul(weighted.reshape(-1, size).T, x.reshape(-1, size), precision="highest")
    return tap(y, probe, moments)


def _principal(moments: jax.Array, target: TargetModule) -> dict[str, jax.Array]:
    """From second moments (stack..., in + 1, in + 1) to the principal axes of the centred inputs and their variance."""
    count, sums = moments[..., -1:, -1:], moments[..., :-1, -1:]
    if not bool((count > 0).any()):
        raise InputError(
            f"{'.'.join(target.path)}: no input of it was seen, so that init='eva' has nothing to start from"
        )
    scatter = moments[..., :-1, :-1] - sums * jnp.swapaxes(sums, -1, -2) / jnp.maximum(count, 1)
    n, (rows, columns) = min(target.size), target.size
    layers = [_axes(one)[:, :n] for one in scatter.reshape(-1, rows, rows)]
    axes = jnp.stack([jnp.pad(one, [(0, 0), (0, columns - n)]) for one in layers])
    variance = jnp.trace(scatter, axis1=-2, axis2=-1)
    return {"inputs": axes.reshape(*target.stack, rows, columns), "variance": variance}


def _axes(scatter: jax.Array) -> jax.Array:
    """The principal axes as columns, the largest first, each times its singular value."""
    u, squares, _ = decomposed(scatter)
    return u * jnp.sqrt(jnp.maximum(squares, 0))[None]
