"""How stable the features are that a step learns: the terms of Stable-LoRA's analysis, for any optimizer.

One step takes a pair from (A, B) to (A_new, B_new). Let z be what its module is given on the batch of the step,
``A' = (1 - lambda) A`` what Stable-LoRA has shrunk A to in it (``A' = A`` for every other optimizer, and once a pair is
stable), ``dA = A_new - A'`` and ``dB = B_new - B``. The step changes the module's output by ::

    s z (A_new B_new - A B)  =  s z A' dB  +  s z dA B  +  s z dA dB  +  s z (A' - A) B
                                 delta1        delta2      delta3         shrink

Each term is reported as its root mean square over all tokens and outputs. LoRA learns features stably where delta1,
delta2 and delta3 neither vanish nor grow with the model's width; an A that starts too large lets delta1 dominate, to
the end of training (Stable-LoRA, arXiv 2603.05204, section 3; LoRA+, arXiv 2402.12354, has delta1 and delta2 the other
way round). Beside them stand ``||A||_F / in`` and ``||B||_F / out``, which the test that ends the shrinking compares.

z lives inside a model that gives nothing away: :mod:`stablelora_jax.lora.probes` brings the measurements out. Sums of
squares are measured, which add up over the calls of a module and over devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.lora.apply import Adapted, Observer
from stablelora_jax.lora.pairs import make_target_module, pairs
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.probes import tap, token_weights, total
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.optimizers import latches
from stablelora_jax.optimizers.stable_lora import kept_share, shrink
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


class Stability(NamedTuple):
    """The terms of one target module; each field has the shape of its stack, zero where a layer has no adapter."""

    delta1: jax.Array  # RMS of s z A' dB
    delta2: jax.Array  # RMS of s z dA B
    delta3: jax.Array  # RMS of s z dA dB
    shrink: jax.Array  # RMS of s z (A' - A) B
    a: jax.Array  # ||A||_F / in, after the step
    b: jax.Array  # ||B||_F / out, after the step


@checked
def stability(
    model: Adapted,
    variables: Mapping[str, Any],
    shrunk: Any,
    after: Any,
    *inputs: Any,
    token_mask: Any = None,
    axis_name: str | None = None,
    **kwargs: Any,
) -> dict[Path, Stability]:
    """The terms of one step at every target module, from one more forward and backward pass; can be jitted.

    Args:
      model: as made by :func:`stablelora_jax.adapted`.
      variables: what ``model.apply`` takes, with the adapters as they were *before* the step as ``"lora"``.
      shrunk: the adapters with A' for A, see :func:`shrunk_adapters`; of them, ``lora_a`` alone is read. For an
        optimizer that shrinks nothing, the adapters before the step.
      after: the adapters after the step.
      *inputs: the batch of the step, passed on to the model.
      token_mask: (B, T), nonzero where a token counts; None for all. It acts on modules whose input begins with the
        axes (B, T). A module that sees other leading axes (rows and tokens flattened, a strided convolution, a module
        mapped over one of them by ``nn.vmap``) is measured over all that it sees, padding included.
      axis_name: the axis of ``pmap`` or ``shard_map`` that the batch is split over; the terms are then of the whole.
      **kwargs: passed on to ``model.apply``. Without ``rngs``, z is as without dropout.

    Returns:
      The terms by path, in the dtype of the adapters. A module from which nothing differentiable leads to the model's
      output measures zero. Products are formed in the module's compute dtype, as on the path itself.

    Raises:
      InputError: adapters that do not fit the model, as ``model.apply`` does, or each other.
    """
    _require_same_pairs(variables["lora"], shrunk, after)
    observed = replace(model, observe=_observer(model.spec, token_mask))
    probes = {path: jnp.zeros((*p["lora_a"].shape[:-2], 5), p["lora_a"].dtype) for path, p in pairs(after).items()}

    def output(probes: dict[Path, jax.Array]) -> jax.Array:
        lora = _lay(variables["lora"], shrunk, after, probes)
        return total(observed.apply({**variables, "lora": lora}, *inputs, **kwargs))

    sums = jax.grad(output)(probes)
    sums = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return {path: _finish(sums[path], pair) for path, pair in pairs(after).items()}


def shrunk_adapters(adapters: Any, opt_state: Any, shrink_ratio: Any) -> Any:
    """``adapters`` with A' for A, as a step that began with them and ended with ``opt_state`` has shrunk them.

    A latch that is still on after a step has shrunk its pair in it. (Under ``optax.MultiSteps`` this holds for the
    steps that update, not between.)

    Args:
      adapters: before the step.
      opt_state: after the step; any state, or :func:`stablelora_jax.optimizers.latches` of it.
      shrink_ratio: lambda as given to ``stable_lora``: a number, a traced scalar or a schedule; None or a state without
        latches: nothing has shrunk.
    """
    if shrink_ratio is None:
        return adapters
    for state in latches(opt_state):
        ratio = shrink_ratio(state.count - 1) if callable(shrink_ratio) else shrink_ratio  # type: ignore[operator]
        for path, pair in pairs(adapters).items():
            latch = tree.get_in(state.shrinking, path)
            if latch is not None:
                adapters = tree.set_in(adapters, path, shrink(pair, kept_share(pair, jnp.asarray(latch), ratio)))
    return adapters


def by_name(view: Mapping[Path, Stability], spec: LoraSpec) -> dict[str, dict[str, float]]:
    """``{dotted module name: {field: number}}`` of concrete terms, one entry a layer; padding is left out."""
    named = {}
    for path, terms in view.items():
        target = make_target_module(path, np.shape(terms.a), (0, 0), spec)
        for i, (name, rank) in enumerate(zip(target.names, target.ranks, strict=True)):
            if rank:
                named[name] = {field: float(np.ravel(value)[i]) for field, value in terms._asdict().items()}
    return named


def _require_same_pairs(before: Any, *others: Any) -> None:
    shapes = [
        {path: (jnp.shape(p["lora_a"]), jnp.shape(p["lora_b"])) for path, p in pairs(adapters).items()}
        for adapters in (before, *others)
    ]
    if any(other != shapes[0] for other in shapes):
        raise InputError("the adapters before the step, as shrunk and after it are not pairs of the same shapes")


def _lay(before: Any, shrunk: Any, after: Any, probes: Mapping[Path, jax.Array]) -> Any:
    """The adapters before the step, with what the observer needs beside each pair."""
    for path, probe in probes.items():
        new = tree.get_in(after, path)
        beside = {"lora_a_new": new["lora_a"], "lora_b_new": new["lora_b"], "lora_probe": probe}
        beside["lora_a_shrunk"] = tree.get_in(shrunk, path)["lora_a"]
        before = tree.set_in(before, path, {**tree.get_in(before, path), **beside})
    return before


def _observer(spec: LoraSpec, token_mask: Any) -> Observer:
    """The output of a module as it is, with the measurement as the gradient of the module's probe."""
    change = PARAMETRIZATIONS[spec.parametrization].delta

    def observe(y: jax.Array, own: Mapping[str, jax.Array], down: Callable[[jax.Array], jax.Array]) -> jax.Array:
        terms = _terms(own, down, change)
        weight = token_weights(terms[0].shape[:-1], token_mask, terms[0].dtype)
        squares = [(weight * jnp.square(term).mean(axis=-1)).sum() for term in terms]
        measured = jnp.stack([*squares, weight.sum()]).astype(own["lora_probe"].dtype)
        return tap(y, own["lora_probe"], jax.lax.stop_gradient(measured))

    return observe


def _terms(own: Mapping[str, jax.Array], down: Callable[[jax.Array], jax.Array], change: Any) -> tuple[jax.Array, ...]:
    """The four signed terms, each (..., out); ``down(a)`` is z a for a (in, any rank)."""
    a, small, new, b = own["lora_a"], own["lora_a_shrunk"], own["lora_a_new"], own["lora_b"]
    z = down(jnp.concatenate([small, new - small, small - a], axis=-1))
    kept, moved, lost = jnp.split(z, 3, axis=-1)
    db = own["lora_b_new"] - b
    factors = ((kept, db), (moved, b), (moved, db), (lost, b))
    return tuple(change(z, {**own, "lora_b": b}, own["lora_scale"]) for z, b in factors)


def _finish(sums: jax.Array, after: Mapping[str, jax.Array]) -> Stability:
    """From sums (..., 5) to root mean squares, with the norms of the pair."""
    deltas = jnp.sqrt(sums[..., :4] / jnp.maximum(sums[..., 4:], 1))
    a, b = after["lora_a"], after["lora_b"]
    norm_a, norm_b = (jnp.linalg.norm(x, axis=(-2, -1)) for x in (a, b))
    delta1, delta2, delta3, shrink = (deltas[..., i] for i in range(4))
    return Stability(delta1, delta2, delta3, shrink, norm_a / a.shape[-2], norm_b / b.shape[-1])
