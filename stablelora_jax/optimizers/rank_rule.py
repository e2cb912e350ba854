"""Learning rates from one rank to another: maximal-update adaptation (Chen, Villar, Hayou, arXiv 2602.06204, Cor. 4.4).

With A random and B = 0, an optimizer whose steps are as large as Adam's, and s = r^-g, the best rate goes as
``n^-1/2 r^-(1 - g)/2``: as ``(n r s)^-1/2``, since two steps of size eta change the outputs by ``s B dA x``, of size
``s r n eta^2``. So the rate stays where alpha does under ``scaling="lora"``, falls as r^-1/2 where s is 1 (alpha = r),
and as r^-1/4 under ``scaling="rslora"``. The rule for A = 0 and B random is left out: no initialiser here starts so.
"""

from __future__ import annotations

import math

from stablelora_jax.lora.spec import LoraSpec


def rate_factor(tuned: LoraSpec, spec: LoraSpec) -> float:
    """What a learning rate that was tuned for ``tuned`` is multiplied by for ``spec``: ``sqrt(r s / (r' s'))``.

    Args:
      tuned: gives the rank r and the scale s of the search; patterns are not looked at.
      spec: gives r' and s'.
    """
    return math.sqrt(_rank_times_scale(tuned) / _rank_times_scale(spec))


def _rank_times_scale(spec: LoraSpec) -> float:
    return spec.alpha if spec.scaling == "lora" else spec.alpha * math.sqrt(spec.rank)
