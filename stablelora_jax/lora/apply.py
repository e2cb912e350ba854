"""``adapted(model, spec)``: any JAX model seen through a spec, with the words of a Linen module.

``lora.init(key, params, *args)`` makes adapters, ``lora.apply({"params": params, "lora": adapters}, *args)`` computes
``x W0 + s (x A) B`` without forming the sum, and ``lora.merge(params, adapters)`` folds them in. There are two paths.
At Flax Linen's own Dense, DenseGeneral, Conv, Einsum and Embed the modules are intercepted
(:mod:`stablelora_jax.lora.intercept`); every other model is read by its computation (:mod:`stablelora_jax.lora.trace`).

Dropout (on x, before A) acts iff ``rngs={"dropout": key}`` is passed. With one key for each row of the batch, shape
(B,), masks depend on the rows alone, and so are the same for every layout of devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.callables import function_of, take_apart
from stablelora_jax.lora.dropout import split_rngs
from stablelora_jax.lora.fitting import require_unambiguous
from stablelora_jax.lora.intercept import Intercepted, apply_intercepted
from stablelora_jax.lora.intercept import Observer as Observer
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.statistics import Calibration, blank_calibration
from stablelora_jax.lora.target_modules import (
    as_dict,
    find_target_modules,
    match_target_modules,
    own_params,
    require_adapters,
)
from stablelora_jax.lora.trace.apply import apply_traced, check_traced, find_targets, layouts_table, merge_traced
from stablelora_jax.lora.transform import checked_dtype, make_adapters, merge, require_key
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


@dataclass(frozen=True)
class Adapted:
    """A model seen through a :class:`LoraSpec`; made by :func:`adapted`.

    ``observe(y, own, down)``, where there is one, gives what an adapted module returns instead of its output ``y``. It
    is called inside every scan, vmap and remat; ``own`` are the module's parameters with all that lies in its adapter,
    and ``down(a)`` contracts another ``a`` (in, any rank) with the module's input, as ``lora_a`` is contracted.
    """

    model: Any
    spec: LoraSpec
    observe: Observer | None = None
    merged: tuple[str, ...] = ()
    found: dict[Path, TargetModule] = field(default_factory=dict, compare=False, repr=False)  # what a trace has found

    @checked
    def init(
        self,
        key: jax.Array,
        params: Any,
        *args: Any,
        dtype: DTypeLike = jnp.float32,
        calibration: Calibration | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Adapters for ``params``: leaves, their axes and their stacks are found by tracing the model.

        Args:
          key: a PRNG key. A pair's draw depends on it and on the name of its module alone.
          params: of Linen ``variables["params"]``, of NNX ``nnx.state(model, nnx.Param)``, of a function its first
            argument. Only shapes are read, but some initialisations and parametrisations, and parameters trained in
            full, start from the values.
          *args: example arguments of the model, or ``jax.ShapeDtypeStruct``s.
          dtype: of the adapters, float32 or float64.
          calibration: where the initialisation starts from data, see :func:`stablelora_jax.calibrate`.
          **kwargs: of the model. Linen's collections beside the parameters may be given as ``variables={...}``.

        Returns:
          A nested dict that mirrors ``params``: ``lora_a`` (stack..., in, r), ``lora_b`` (stack..., r, out) at each
          adapted module or leaf. The axes of a stack are those that a scan, a vmap or a batched product goes over.

        Raises:
          InputError: a pattern matches nothing, or a leaf is read in a way that no pair can follow.
        """
        dtype = checked_dtype(dtype)
        require_key(key)
        targets = self.targets(params, *args, **kwargs)
        adapters = make_adapters(key, as_dict(params), targets, self.spec, dtype, calibration)
        if self.found:
            others = kwargs.pop("variables", {})
            check_traced(self, {**others, "params": own_params(params), "lora": adapters}, args, kwargs)
        return adapters

    def targets(self, params: Any, *args: Any, **kwargs: Any) -> dict[Path, TargetModule]:
        """The modules or leaves that the spec selects, by path; arguments and errors are those of :meth:`init`."""
        others = dict(kwargs.pop("variables", {}))
        self.found.clear()
        by_name = self._by_name(params, others, args, kwargs)
        if by_name is None:
            self.found.update(find_targets(self, {**others, "params": own_params(params)}, args, kwargs))
        return dict(self.found) if by_name is None else by_name

    @checked
    def apply(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        """The model with the low-rank path; without ``"lora"`` in ``variables`` it is the base model.

        Args:
          variables: ``"params"``, the other collections of a Linen model, plus ``"lora"`` (adapters) and, optionally,
            ``"lora_hp"`` (scales and dropout rates as arrays, see :func:`stablelora_jax.lora_hyperparams`). With
            ``"lora_rows"`` (B,) int, each row of the batch has an adapter of its own: see
            :mod:`stablelora_jax.lora.rows`. An NNX module takes its state but for the parameters as ``"rest"``.
          *args: passed on to the model.
          rngs: as for any Linen model, a dict or one key; ``"dropout"`` may hold one key, or one key per batch row.
          **kwargs: passed on to ``model.apply`` (``method``, ``mutable``) and from there to the model.

        The low-rank path is differentiable in forward and reverse mode. So is this package's decoder with
        ``attention="xla"``; its other kernels and ``summed_loss`` have reverse mode, and forward over reverse, only.

        Raises:
          InputError: adapters that do not fit the model, or a leaf that is read in a way that no pair can follow.
        """
        if "params" not in variables:
            raise InputError('the variables lack "params", the parameters of the base')
        variables = {**variables, "params": own_params(variables["params"])}
        keys, rngs = split_rngs(rngs)
        if "lora" not in variables:
            return function_of(self.model, variables, rngs)(variables["params"], *args, **kwargs)
        variables["lora"] = as_dict(variables["lora"])
        only = self.observe is not None or "lora_rows" in variables
        if not isinstance(self.model, nn.Module):
            if "lora_rows" in variables:
                raise InputError("lora_rows need a Linen model of Flax's own modules")
            if isinstance(rngs, Mapping) and set(rngs) - {"dropout"}:
                raise InputError(f"rngs hold {sorted(set(rngs) - {'dropout'})[0]!r}, which only Linen models have")
            return apply_traced(self, variables, args, kwargs, keys, rngs)
        if self.found or self.merged:
            return apply_traced(self, variables, args, kwargs, keys, rngs)
        how = Intercepted(self.spec, self.observe)
        try:
            return apply_intercepted(self.model, how, variables, args, kwargs, keys, rngs)
        except InputError:
            if only or not self._reads(variables, args, kwargs):
                raise
        return apply_traced(self, variables, args, kwargs, keys, rngs)

    @checked
    def merge(self, params: Any, adapters: Any, *args: Any, safe: bool = True, **kwargs: Any) -> Any:
        """``params`` with the adapters folded in, as :func:`stablelora_jax.merge`, in the kind of tree that they are.

        Args:
          params: the base; not changed.
          adapters: as made by :meth:`init`.
          *args: example arguments of the model, by which the axes of its leaves are found. They are not needed where
            ``init`` or ``apply`` of this object has been called, nor where names and shapes say it all. A Linen
            leaf called ``kernel`` is then taken to have its inputs first, as in Flax's own layers.
          safe: refuse a kernel that holds NaN or infinity.
          **kwargs: of the model.

        Raises:
          InputError: adapters that do not fit.
        """
        if not self.found and (args or kwargs):
            others = dict(kwargs.pop("variables", {}))
            if self._by_name(params, others, args, kwargs) is None:
                self.found.update(find_targets(self, {**others, "params": own_params(params)}, args, kwargs))
        if not self.found:
            try:
                if not isinstance(self.model, nn.Module):  # whose layers have their inputs first
                    nested = as_dict(params)
                    require_unambiguous(match_target_modules(nested, as_dict(adapters), self.spec), nested)
                return merge(params, as_dict(adapters), self.spec, safe=safe)
            except InputError as error:
                raise InputError(f"{error}; or give example arguments, merge(params, adapters, *args)") from None
        return merge_traced(self, params, as_dict(adapters), safe)

    @checked
    def describe(self, params: Any, *args: Any, **kwargs: Any) -> str:
        """A table of every leaf of ``params`` that could be adapted: its shape, and which axes the model contracts.

        Args:
          params: of the model.
          *args: example arguments of the model.
          **kwargs: of the model.
        """
        others = dict(kwargs.pop("variables", {}))
        return layouts_table(self, {**others, "params": own_params(params)}, args, kwargs)

    def state(self, adapters: Any) -> Any:
        """``adapters`` as an ``nnx.State`` of ``nnx.LoRAParam``; ``apply`` and ``merge`` take it as well."""
        from flax import nnx

        return nnx.State(jax.tree.map(nnx.LoRAParam, as_dict(adapters)))

    def _by_name(self, params: Any, others: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
        """The target modules by names and shapes, if the model is Linen's and its modules read them so; else None."""
        if not isinstance(self.model, nn.Module) or self.merged:
            return None
        nested = as_dict(params)

        def run() -> Any:
            blank = blank_calibration(targets, self.spec)
            adapters = make_adapters(jax.random.key(0), nested, targets, self.spec, jnp.float32, blank)
            variables = {**others, "params": nested, "lora": adapters}
            return apply_intercepted(self.model, Intercepted(self.spec, None), variables, args, kwargs, None, None)

        try:
            targets = find_target_modules(nested, self.spec)
            jax.eval_shape(run)
        except Exception:  # whatever the model raises, it raises again when it is traced
            return None
        return targets

    def _reads(self, variables: Mapping[str, Any], args: Any, kwargs: Any) -> bool:
        """Whether tracing finds where ``variables["lora"]`` belong, though names and shapes do not."""
        try:
            self.found.update(find_targets(self, variables, args, kwargs))
            require_adapters(self.found, variables["lora"], self.spec)
            return True
        except InputError:
            self.found.clear()
            return False


@checked
def adapted(model: Any, spec: LoraSpec, *, merged: tuple[str, ...] | list[str] = ()) -> Adapted:
    """``model`` with the low-rank path of ``spec``: an object with ``init``, ``apply``, ``merge`` and ``describe``.

    Args:
      model: a Flax Linen module, a Flax NNX module (which is not changed), or any pure function of
        ``(params, *args, **kwargs)``.
      spec: what to adapt and how.
      merged: endings of names of leaves that are read in a way that no pair can follow: their ``W0 + s A B`` is formed
        inside ``apply``, at the cost of memory and FLOPs of the leaf's size.

    Raises:
      InputError: the model is of no such kind.
    """
    return Adapted(take_apart(model), spec, merged=tuple(merged))
