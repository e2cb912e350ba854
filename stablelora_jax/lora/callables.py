"""A model of any kind as a function of its variables: Flax Linen, Flax NNX, or a function of a tree of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from stablelora_jax.utils.errors import InputError

OWN = ("lora", "lora_hp", "lora_rows")  # collections that a model never sees
Function = Callable[..., Any]  # (params, *args, **kwargs)


class NnxModel(NamedTuple):
    """An ``nnx.Module`` taken apart, so that the user's own is neither read again nor changed."""

    graphdef: Any
    rest: Any  # its state but for the parameters


def take_apart(model: Any) -> Any:
    """``model`` as :func:`function_of` reads it.

    Raises:
      InputError: it is neither a Linen or NNX module nor a function.
    """
    if isinstance(model, nn.Module):
        return model
    from flax import nnx

    if isinstance(model, nnx.Module):
        graphdef, _, rest = _split(model)
        return NnxModel(graphdef, rest)
    if not callable(model):
        raise InputError(f"model must be a Linen or NNX module, or a function of (params, ...), not {model!r:.60}")
    return model


def function_of(model: Any, variables: Mapping[str, Any], rngs: Any) -> Function:
    """``(params, *args, **kwargs) -> outputs`` of what :func:`take_apart` gives, its other collections held.

    Args:
      model: of any kind.
      variables: the collections of a Linen model; of an NNX module ``"rest"``, its state but for the parameters
        (default: as it was when it was adapted). What is ours is not handed on.
      rngs: for a Linen model.
    """
    others = {name: value for name, value in variables.items() if name not in ("params", *OWN)}
    if isinstance(model, nn.Module):

        def linen(params: Any, *args: Any, **kwargs: Any) -> Any:
            return model.apply({**others, "params": params}, *args, rngs=rngs, **kwargs)

        return linen
    known = {"rest"} if isinstance(model, NnxModel) else set()
    if unknown := sorted(set(others) - known):
        raise InputError(
            f"the variables hold {unknown[0]!r}, which this kind of model does not have: give it as an argument"
        )
    if not isinstance(model, NnxModel):
        return model  # type: ignore[no-any-return]

    def module(params: Any, *args: Any, method: str = "__call__", mutable: bool = False, **kwargs: Any) -> Any:
        from flax import nnx

        whole = nnx.merge(model.graphdef, params, others.get("rest", model.rest), copy=True)
        out = getattr(whole, method)(*args, **kwargs)
        return (out, _split(whole)[2]) if mutable else out

    return module


def _split(module: Any) -> tuple[Any, Any, Any]:
    """The graph of an NNX module, its parameters, and the rest of its state."""
    from flax import nnx

    found: Any = nnx.split(module, nnx.Param, ...)
    return found  # type: ignore[no-any-return]
