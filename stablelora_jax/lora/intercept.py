"""The low-rank path at Flax's own modules: a Linen model computes ``x W0 + s (x A) B`` without a change to its code.

:func:`apply_intercepted` lays the adapters into ``params`` beside the kernels they change and runs the model under
``flax.linen.intercept_methods``. The interceptor finds ``lora_a`` and ``lora_b`` among the module's own parameters,
where every ``nn.scan``, ``nn.vmap`` and ``nn.remat`` has already sliced them. (A separate collection would be ignored,
without an error, by a model whose scan does not list it; a Python closure would not be sliced.) The scale and, when
dropout acts, its rate and keys take the same way in.

Beside :mod:`stablelora_jax.lora.trace`, which reads any model, this is the path of this package's decoder: it is traced
once and not twice, and gives each row of a batch its own adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stablelora_jax.lora.callables import OWN
from stablelora_jax.lora.contraction import contract
from stablelora_jax.lora.dense import changed_kernel, is_dense
from stablelora_jax.lora.dropout import drop, target_keys
from stablelora_jax.lora.full_parameters import apply_full_parameters, match_trained_parameters
from stablelora_jax.lora.leaf_checks import require_leaves
from stablelora_jax.lora.leaves import FROZEN
from stablelora_jax.lora.pairs import FULL, TargetModule
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.plain import plain_adapters
from stablelora_jax.lora.rows import by_number, each_row, numbered, one_of
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.stacks import require_stacks
from stablelora_jax.lora.target_modules import as_dict, from_matrix, match_target_modules, to_matrix
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

LINEAR = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Einsum)
SCOPE = "lora"  # in the names of operations, by which a profile tells them from the base's
Observer = Callable[[jax.Array, Mapping[str, jax.Array], Callable[[jax.Array], jax.Array]], jax.Array]


class Intercepted(NamedTuple):
    """What the interceptor is given."""

    spec: LoraSpec
    observe: Observer | None


def apply_intercepted(
    model: nn.Module,
    how: Intercepted,
    variables: Mapping[str, Any],
    args: Any,
    kwargs: Any,
    keys: jax.Array | None,
    rngs: Any,
) -> Any:
    """``model.apply`` with the low-rank path at Flax's own modules.

    Args:
      model: of Linen.
      how: the spec, and an observer.
      variables: as for :meth:`stablelora_jax.lora.apply.Adapted.apply`, with ``"lora"``.
      args: of the model.
      kwargs: of ``model.apply``.
      keys: of dropout; None where it is off.
      rngs: for the model.

    Raises:
      InputError: adapters that do not fit the model, or that no module of it has read.
    """
    spec, own = how.spec, {name: value for name, value in variables.items() if name not in OWN}
    params, rows = as_dict(own["params"]), variables.get("lora_rows")
    if rows is not None and is_dense(spec):
        raise InputError(f"lora_rows take adapters of pairs, not {spec.parametrization}: convert them by to_lora")
    one = variables["lora"] if rows is None else one_of(variables["lora"])
    targets = match_target_modules(params, one, spec)
    params = _checked_full(how, params, one, targets)
    plain: Any = partial(plain_adapters, targets=targets, spec=spec)
    adapters = plain(variables["lora"]) if rows is None else jax.vmap(plain)(variables["lora"])
    off = keys is None or (spec.dropout == 0 and "lora_hp" not in variables)
    keys = None if off else keys
    laid = _lay(params, adapters, variables.get("lora_hp"), targets, keys, spec, rows)
    reads = dict.fromkeys(targets, 0)
    try:
        with nn.intercept_methods(_interceptor(how, targets, reads, keys)):
            out = model.apply({**own, "params": laid}, *args, rngs=rngs, **kwargs)
    except (IndexError, TypeError, ValueError) as error:
        if not isinstance(error, InputError):
            require_stacks(lambda own: model.apply(own, *args, rngs=rngs, **kwargs), own, targets)
        raise
    unread = [path for path, count in reads.items() if not count]
    if unread and kwargs.get("method") is None:
        raise InputError(
            f"no Dense, DenseGeneral, Conv, Einsum or Embed of the model read the adapters at "
            f"{', '.join('.'.join(path) for path in sorted(unread))}: exclude them from the spec"
        )
    return out


def _checked_full(
    how: Intercepted, params: dict[str, Any], adapters: Any, targets: Mapping[Path, TargetModule]
) -> dict[str, Any]:
    """``params`` with what is trained in full; an observer may have laid more beside the pairs."""
    leaves = match_trained_parameters(params, adapters, how.spec)
    if how.observe is None:
        require_leaves(targets, adapters, how.spec)
    return apply_full_parameters(params, adapters, leaves, cast=False)


def _lay(
    params: dict[str, Any],
    adapters: Any,
    numbers: Any,
    targets: Mapping[Path, TargetModule],
    keys: Any,
    spec: LoraSpec,
    rows: Any,
) -> dict[str, Any]:
    """``params`` with each target module's pair, scale and, where dropout acts, its rate and keys as further leaves."""
    for path, target in targets.items():
        extra = adapter_of(adapters, numbers, target, spec, keys is not None)
        if rows is not None:
            extra = by_number(extra, rows, target.stack)
        if keys is not None:
            extra |= {"lora_key": target_keys(keys, target)}
        module = tree.get_in(params, path)
        if clash := set(extra) & set(module):
            raise InputError(f"{'.'.join(path)} of the base already has a parameter called {sorted(clash)[0]}")
        params = tree.set_in(params, path, {**module, **extra})
    return params


def adapter_of(adapters: Any, numbers: Any, target: TargetModule, spec: LoraSpec, drops: bool) -> dict[str, Any]:
    """The arrays of the adapter at ``target`` with its scale and, where dropout acts, its rate."""
    given = tree.get_in(numbers, target.path) or {}
    own = {name: leaf for name, leaf in tree.get_in(adapters, target.path).items() if name != FULL}
    found = {**own, "lora_scale": given.get("lora_scale", target.scale())}
    if drops:
        rate = jnp.asarray(given.get("lora_dropout", spec.dropout))
        found["lora_dropout"] = rate if rate.ndim > len(target.stack) else jnp.broadcast_to(rate, target.stack)
    return found


def _interceptor(how: Intercepted, targets: Mapping[Path, TargetModule], reads: dict[Path, int], keys: Any) -> Any:
    member = PARAMETRIZATIONS[how.spec.parametrization]

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        path: Any = module.path if module.scope is not None else None
        mine = isinstance(module, LINEAR) if method == "__call__" else False
        mine = mine or (isinstance(module, nn.Embed) and method in ("__call__", "attend"))
        if path not in targets or not mine:
            return next_fun(*args, **kwargs)
        before = reads[path]
        own = module.variables["params"]
        if is_dense(how.spec):
            reads[path] += 1
            return _with_changed_kernel(how.spec, module, own, targets[path].in_axes, method, args, kwargs)
        if method == "attend":
            reads[path] += 1
            return _attended(member, next_fun, args[0] if args else kwargs["query"], own)
        y = next_fun(*args, **kwargs)
        if reads[path] > before:  # a subclass that calls its parent: the innermost call has added the change
            return y
        reads[path] += 1
        x, in_axes = args[0] if args else kwargs["inputs"], targets[path].in_axes
        if dropped := "lora_key" in own and not isinstance(module, nn.Embed):
            rate = own["lora_dropout"][own["lora_rows"]] if "lora_rows" in own else own["lora_dropout"]
            x = drop(x, rate, jax.random.wrap_key_data(own["lora_key"], impl=jax.random.key_impl(keys)))

        def down(x: jax.Array, a: jax.Array) -> Any:
            return contract(module, x, _kernel(own), a, in_axes, args[1:], kwargs)

        def changed(y: jax.Array, x: jax.Array, adapter: Any, gain: Any) -> jax.Array:
            return _changed(member, module, y, {**own, **adapter}, in_axes, partial(down, x), gain, dropped)

        with jax.named_scope(SCOPE):
            gain = _gain(member, own, in_axes)
            y = each_row(changed, own, y, x, gain) if "lora_rows" in own else changed(y, x, {}, gain)
        return y if how.observe is None else how.observe(y, own, lambda a: down(x, a)[0])

    return intercept


def _with_changed_kernel(
    spec: LoraSpec, module: Any, own: Any, in_axes: tuple[int, ...], method: str, args: Any, kwargs: Any
) -> jax.Array:
    """The output of ``module`` with the kernel of a dense parametrisation, formed here: of one layer at a time."""
    kernel = _kernel(own)
    changed = changed_kernel(to_matrix(kernel, 0, in_axes), own, own["lora_scale"], spec)
    bare = {name: leaf for name, leaf in own.items() if not name.startswith(("lora_", FROZEN))}
    bare["kernel" if "kernel" in own else "embedding"] = from_matrix(changed, kernel.shape, 0, in_axes)
    with jax.named_scope(SCOPE):
        y: jax.Array = module.clone(parent=None, name=None).apply({"params": bare}, *args, method=method, **kwargs)
    return y


def _gain(member: Any, own: Any, in_axes: tuple[int, ...]) -> Any:
    """The gain of the module's own product, (out,) or one for each adapter; None where there is none."""
    adapter = {name: leaf for name, leaf in own.items() if name.startswith("lora_")}
    gain: Any = member.gain
    if "lora_rows" in own:
        adapter, gain = numbered(own), jax.vmap(gain, (None, 0, 0))
    return gain(to_matrix(_kernel(own), 0, in_axes), adapter, own["lora_scale"])


def _changed(
    member: Any,
    module: nn.Module,
    y: jax.Array,
    own: Any,
    in_axes: tuple[int, ...],
    down: Any,
    gain: jax.Array | None,
    dropped: bool,
) -> jax.Array:
    """The output ``y`` of ``module`` with the change of its adapter.

    Where the parametrisation has a gain c, what it multiplies is the module's own product, without the bias, and of the
    input after dropout, as in PEFT.
    """
    z, place = down(own["lora_a"])
    z = checkpoint_name(z, "lora_xa")
    change = member.delta(z, own, own["lora_scale"])
    if "lora_bias" in own:
        bias = own["lora_bias"].astype(change.dtype) * own["lora_scale"].astype(change.dtype)
        change = change + _leading(bias, change.ndim)
    apart = isinstance(module, nn.Conv | nn.Einsum)
    if gain is None:
        return add(y, place(change), apart)
    accum_dtype = jnp.promote_types(y.dtype, jnp.float32)
    gain = jnp.broadcast_to(gain.astype(accum_dtype), change.shape)
    if dropped or (apart and "bias" in own):
        product = place(down(to_matrix(_kernel(own), 0, in_axes))[0]).astype(accum_dtype)
    else:
        bias = own.get("bias", jnp.zeros((), accum_dtype)).astype(accum_dtype)
        product = y.astype(accum_dtype) - _leading(bias, y.ndim)
    return add(y, place(gain - 1) * product + place(gain * change), apart)


def _leading(x: jax.Array, ndim: int) -> jax.Array:
    """``x`` with leading axes of size 1, up to ``ndim`` axes."""
    return jnp.expand_dims(x, range(ndim - x.ndim))


def _attended(member: Any, next_fun: Any, x: jax.Array, own: Any) -> jax.Array:
    """``x W'^T`` of an embedding W (vocabulary, features): the same change of W as in a look-up, transposed."""
    gain = _gain(member, own, (0,))
    if "lora_rows" in own:
        gain = None if gain is None else jnp.expand_dims(gain[own["lora_rows"]], range(1, x.ndim - 1))
    x = x if gain is None else (x * _leading(gain, x.ndim)).astype(x.dtype)
    y = next_fun(x)

    def changed(y: jax.Array, x: jax.Array, adapter: Any, gain: None) -> jax.Array:
        a, b, scale = (adapter[name] for name in ("lora_a", "lora_b", "lora_scale"))
        accum_dtype = jnp.promote_types(x.dtype, jnp.float32)
        z = jnp.matmul(x, b.astype(x.dtype).T, preferred_element_type=accum_dtype).astype(x.dtype)
        return add(y, member.delta(z, {**adapter, "lora_b": a.T}, scale), False)

    with jax.named_scope(SCOPE):
        return each_row(changed, own, y, x, None) if "lora_rows" in own else changed(y, x, own, None)


def _kernel(own: Mapping[str, jax.Array]) -> jax.Array:
    return own["kernel"] if "kernel" in own else own["embedding"]


def add(y: jax.Array, delta: jax.Array, apart: bool) -> jax.Array:
    """``y + delta``, added at least in float32, in the dtype of ``y``.

    On CPU the change is computed apart, and with ``apart`` the module's own output too: XLA would otherwise fuse the
    sum into other products and round those differently, so that adapters with B = 0 changed the last bit (seen with
    jax 0.12). Elsewhere the fusion is worth more.
    """
    if jax.default_backend() == "cpu":
        delta = jax.lax.optimization_barrier(delta)
        y = jax.lax.optimization_barrier(y) if apart else y
    return (y.astype(delta.dtype) + delta).astype(y.dtype)
