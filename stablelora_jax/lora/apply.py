"""The low-rank path: any Linen model computes ``x W0 + s (x A) B`` without a change to its code.

``adapted(model, spec).apply({"params": params, "lora": adapters}, x)`` lays the adapters into ``params`` beside the
kernels they change and runs the model under ``flax.linen.intercept_methods``. The interceptor finds ``lora_a`` and
``lora_b`` among the module's own parameters, where every ``nn.scan``, ``nn.vmap`` and ``nn.remat`` has already sliced
them. (A separate collection would be ignored, without an error, by a model whose scan does not list it; a Python
closure would not be sliced.) The scale and, when dropout acts, its rate and keys take the same way in.

Dropout (on x, before A) acts iff ``rngs={"dropout": key}`` is passed. With one key for each row of the batch, shape
(B,), masks depend on the rows alone, and so are the same for every layout of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stablelora_jax.lora.contraction import contract
from stablelora_jax.lora.dropout import drop, split_rngs, target_keys
from stablelora_jax.lora.full_parameters import apply_full_parameters, match_trained_parameters
from stablelora_jax.lora.pairs import FULL, TargetModule
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.rows import by_number, each_row, numbered, one_of
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.stacks import require_stacks
from stablelora_jax.lora.target_modules import as_dict, match_target_modules, require_leaves, to_matrix
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

LINEAR = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Einsum)
SCOPE = "lora"  # in the names of operations, by which a profile tells them from the base's
Observer = Callable[[jax.Array, Mapping[str, jax.Array], Callable[[jax.Array], jax.Array]], jax.Array]


@dataclass(frozen=True)
class Adapted:
    """A Linen model seen through a :class:`LoraSpec`; made by :func:`adapted`.

    ``observe(y, own, down)``, where there is one, gives what an adapted module returns instead of its output ``y``. It
    is called inside every scan, vmap and remat; ``own`` are the module's parameters with all that lies in its adapter,
    and ``down(a)`` contracts another ``a`` (in, any rank) with the module's input, as ``lora_a`` is contracted.
    """

    model: nn.Module
    spec: LoraSpec
    observe: Observer | None = None

    @checked
    def apply(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        """``model.apply`` with the low-rank path; without ``"lora"`` in ``variables`` it is the base model's.

        Args:
          variables: the model's collections, plus ``"lora"`` (adapters) and, optionally, ``"lora_hp"`` (scales and
            dropout rates as arrays, see :func:`stablelora_jax.lora_hyperparams`). With ``"lora_rows"`` (B,) int, each
            row of the batch has an adapter of its own: see :mod:`stablelora_jax.lora.rows`.
          *args: passed on to the model.
          rngs: as for any Linen model, a dict or one key; ``"dropout"`` may hold one key, or one key per batch row.
          **kwargs: passed on to ``model.apply`` (``method``, ``mutable``) and from there to the model.

        The low-rank path is differentiable in forward and reverse mode. So is this package's decoder with
        ``attention="xla"``; its other kernels and ``summed_loss`` have reverse mode, and forward over reverse, only.

        Raises:
          InputError: adapters that do not fit the model, or that no module of it has read.
        """
        if "params" not in variables:
            raise InputError('the variables lack "params", the parameters of the base')
        own = {name: value for name, value in variables.items() if name not in ("lora", "lora_hp", "lora_rows")}
        keys, rngs = split_rngs(rngs)
        if "lora" not in variables:
            return self.model.apply(own, *args, rngs=rngs, **kwargs)
        params, rows = as_dict(own["params"]), variables.get("lora_rows")
        one = variables["lora"] if rows is None else one_of(variables["lora"])
        targets = match_target_modules(params, one, self.spec)
        params = self._checked_full(params, one, targets)
        off = keys is None or (self.spec.dropout == 0 and "lora_hp" not in variables)
        keys = None if off else keys
        laid = _lay(params, variables["lora"], variables.get("lora_hp"), targets, keys, self.spec, rows)
        reads = dict.fromkeys(targets, 0)
        try:
            with nn.intercept_methods(_interceptor(self, targets, reads, keys)):
                out = self.model.apply({**own, "params": laid}, *args, rngs=rngs, **kwargs)
        except (IndexError, TypeError, ValueError) as error:
            if not isinstance(error, InputError):
                require_stacks(lambda own: self.model.apply(own, *args, rngs=rngs, **kwargs), own, targets)
            raise
        unread = [path for path, count in reads.items() if not count]
        if unread and kwargs.get("method") is None:
            raise InputError(
                f"no Dense, DenseGeneral, Conv, Einsum or Embed of the model read the adapters at "
                f"{', '.join('.'.join(path) for path in sorted(unread))}: exclude them from the spec"
            )
        return out

    def _checked_full(
        self, params: dict[str, Any], adapters: Any, targets: Mapping[Path, TargetModule]
    ) -> dict[str, Any]:
        """``params`` with what is trained in full; an observer may have laid more beside the pairs."""
        leaves = match_trained_parameters(params, adapters, self.spec)
        if self.observe is None:
            require_leaves(targets, adapters, self.spec)
        return apply_full_parameters(params, adapters, leaves, cast=False)


@checked
def adapted(model: nn.Module, spec: LoraSpec) -> Adapted:
    """``model`` with the low-rank path of ``spec``: an object with the ``apply`` of a Linen module."""
    return Adapted(model, spec)


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
        given = tree.get_in(numbers, path) or {}
        own = {name: leaf for name, leaf in tree.get_in(adapters, path).items() if name != FULL}
        extra = {**own, "lora_scale": given.get("lora_scale", target.scale())}
        if keys is not None:
            rate = jnp.asarray(given.get("lora_dropout", spec.dropout))
            rate = rate if rate.ndim > len(target.stack) else jnp.broadcast_to(rate, target.stack)
            extra |= {"lora_dropout": rate}
        if rows is not None:
            extra = by_number(extra, rows, target.stack)
        if keys is not None:
            extra |= {"lora_key": target_keys(keys, target)}
        module = tree.get_in(params, path)
        if clash := set(extra) & set(module):
            raise InputError(f"{'.'.join(path)} of the base already has a parameter called {sorted(clash)[0]}")
        params = tree.set_in(params, path, {**module, **extra})
    return params


def _interceptor(model: Adapted, targets: Mapping[Path, TargetModule], reads: dict[Path, int], keys: Any) -> Any:
    member = PARAMETRIZATIONS[model.spec.parametrization]

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        path: Any = module.path if module.scope is not None else None
        mine = isinstance(module, LINEAR) if method == "__call__" else False
        mine = mine or (isinstance(module, nn.Embed) and method in ("__call__", "attend"))
        if path not in targets or not mine:
            return next_fun(*args, **kwargs)
        before = reads[path]
        own = module.variables["params"]
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
        return y if model.observe is None else model.observe(y, own, lambda a: down(x, a)[0])

    return intercept


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
        return _add(y, place(change), apart)
    accum_dtype = jnp.promote_types(y.dtype, jnp.float32)
    gain = jnp.broadcast_to(gain.astype(accum_dtype), change.shape)
    if dropped or (apart and "bias" in own):
        product = place(down(to_matrix(_kernel(own), 0, in_axes))[0]).astype(accum_dtype)
    else:
        bias = own.get("bias", jnp.zeros((), accum_dtype)).astype(accum_dtype)
        product = y.astype(accum_dtype) - _leading(bias, y.ndim)
    return _add(y, place(gain - 1) * product + place(gain * change), apart)


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
        return _add(y, member.delta(z, {**adapter, "lora_b": a.T}, scale), False)

    with jax.named_scope(SCOPE):
        return each_row(changed, own, y, x, None) if "lora_rows" in own else changed(y, x, own, None)


def _kernel(own: Mapping[str, jax.Array]) -> jax.Array:
    return own["kernel"] if "kernel" in own else own["embedding"]


def _add(y: jax.Array, delta: jax.Array, apart: bool) -> jax.Array:
    """``y + delta``, added at least in float32, in the dtype of ``y``.

    On CPU the change is computed apart, and with ``apart`` the module's own output too: XLA would otherwise fuse the
    sum into other products and round those differently, so that adapters with B = 0 changed the last bit (seen with
    jax 0.12). Elsewhere the fusion is worth more.
    """
    if jax.default_backend() == "cpu":
        delta = jax.lax.optimization_barrier(delta)
        y = jax.lax.optimization_barrier(y) if apart else y
    return (y.astype(delta.dtype) + delta).astype(y.dtype)
