"""Llama 3.1's rotary scaling, as a GGUF file carries it: not as parameters, but as the factors that come of them.

llama.cpp divides the i-th rotary frequency by the i-th number of ``rope_freqs.weight``, which its
``convert_hf_to_gguf.py`` computes from ``rope_scaling`` of ``config.json``. Back from the factors: ``factor`` is the
largest of them, and of the published ``low_freq_factor`` 1 and ``high_freq_factor`` 4 with an
``original_max_position_embeddings`` that is a power of two, those that reproduce every factor are the answer. (Only
low / original and high / original matter, so that nothing is lost by fixing two of the three.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stablelora_jax.models.architecture import Rope
from stablelora_jax.models.rope import frequencies
from stablelora_jax.utils.errors import InputError

ROPE_FREQS = "rope_freqs.weight"
ORIGINALS = (8192, *(2**n for n in range(4, 21)))  # that of Llama 3.1 and 3.2 first
PRECISION = 1e-5  # relative: float32 powers of theta, enlarged by the steepest blend between kept and divided


def llama3_scaling(factors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """``rope_scaling`` of ``config.json`` for the content of ``rope_freqs.weight``.

    Args:
      factors: (head_dim / 2,) float32.
      config: with ``head_dim``, ``rope_theta`` and the ``rope_scaling`` that the metadata gave.

    Returns:
      A mapping with ``rope_type`` ``llama3``, or None where every factor is 1.

    Raises:
      InputError: factors that do not come of such parameters, or that come on top of another scaling.
    """
    if factors.shape != (config["head_dim"] // 2,) or config["head_dim"] % 2:
        raise InputError(f"{ROPE_FREQS} has shape {factors.shape}, heads have {config['head_dim']} dimensions")
    if config["rope_scaling"]:
        raise InputError(f"both {ROPE_FREQS} and rope.scaling.* are given; use the model's safetensors instead")
    if (factors == 1).all():
        return None
    theta, factor = config["rope_theta"], float(str(factors.max()))  # 8.3, not the float32 nearest to it
    plain = frequencies(Rope(theta), config["head_dim"])
    for original in ORIGINALS if 1 < factor < np.inf else ():
        rope = Rope(theta, "llama3", factor, 1.0, 4.0, original)
        if np.allclose(plain / frequencies(rope, config["head_dim"]), factors, rtol=PRECISION, atol=0):
            low_high = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {"rope_type": "llama3", "factor": factor, **low_high, "original_max_position_embeddings": original}
    raise InputError(
        f"the factors in {ROPE_FREQS} (largest {factor:g}) are not those of Llama 3's rotary scaling;"
        " use the model's safetensors instead"
    )
