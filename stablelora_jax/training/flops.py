"""FLOPs of LoRA training: by formula, and counted in a traced program.

Of a frozen matrix with P entries a token costs 2 P forwards and 2 P backwards, for the gradient of its input: the third
product of full training, the gradient of the matrix, is never formed. Of the factors it costs 2 forwards, 2 for the
gradient of what each was given, and 2 for its own: 6 P_lora. Attention's scores and their product with the values are
2 d FLOPs each for every key that a query sees, d the width of all heads together, and twice that backwards; under the
causal mask a query of a text of T tokens sees T / 2 keys on average. Together, for each token::

    4 P + 6 P_lora + 6 L T d

P counts all matrix products, with the head's V D for the share of loss tokens, since only these have logits; the look-
up of embeddings is no product. Of texts packed into rows, T is ``sum(len ** 2) / sum(len)``: the mean, over tokens, of
the length of the text in which they are. What a program computes twice, rematerialised, is not counted, nor are masked
scores: this is the work of the model, which a model FLOPs utilisation compares with the peak of the device (the
convention of PaLM, arXiv 2204.02311, appendix B, without its full-square attention).
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from stablelora_jax.utils.errors import InputError

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by what ``device_kind`` contains; first match.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p calls itself so
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, by jax's (and PyTorch's) name for it; None for one that is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)


def flops_per_token(config: Any, lora: int, length: float, *, loss_fraction: float = 1.0, frozen: int = 0) -> float:
    """``4 P + 6 P_lora + 6 L T d`` of this module's docstring.

    Args:
      config: a ``DecoderConfig``; its fields are Hugging Face's.
      lora: number of entries of the adapter pairs in the layers.
      length: T, for packed texts ``sum(len ** 2) / sum(len)``.
      loss_fraction: the share of tokens whose logits are computed.
      frozen: entries among ``lora`` that are constant, as A in LoRA-FA: their gradient, 2 FLOPs each, is not computed.
    """
    heads = config.num_attention_heads * config.head_dim
    attention = 2 * heads + 2 * config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    base = config.num_hidden_layers * layer + loss_fraction * config.vocab_size * config.hidden_size
    flops: float = 4 * base + 6 * lora - 2 * frozen + 6 * config.num_hidden_layers * length * heads
    return flops


def dots(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """FLOPs of all ``dot_general`` that a run of ``jaxpr`` does, as ``jax.make_jaxpr`` gives it.

    A scan's body counts for each of its turns, a ``shard_map``'s on each device, the branches of a ``cond`` as the
    costliest; jit, remat, custom derivatives and other calls as what they call. Nothing but ``dot_general`` is counted:
    no convolution, and no attention that is one call of cuDNN.

    Raises:
      InputError: a while loop or a kernel holds products, and nothing says how often they are done.
    """
    body = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_dots_of(equation) for equation in body.eqns)


def _dots_of(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    inner = [dots(part) for part in _inside(params)]
    if name in ("while", "pallas_call") and any(inner):
        raise InputError(f"a {name} holds matrix products, and how often they are done is not known")
    if name == "cond":
        return max(inner)
    times = {"scan": lambda: params["length"], "shard_map": lambda: math.prod(params["mesh"].shape.values())}
    total: int = times.get(name, lambda: 1)() * sum(inner)
    return total


def _product(equation: Any) -> int:
    """Two for each entry of the result and of the contracted axes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    flops: int = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    return flops


def _inside(params: Any) -> list[Any]:
    """The programs among an equation's parameters; a rule for derivatives that was not asked for is none."""
    leaves = [part for value in params.values() for part in (value if isinstance(value, (tuple, list)) else [value])]
    return [part for part in leaves if isinstance(part, (ClosedJaxpr, Jaxpr))]
