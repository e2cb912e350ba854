"""Rates across ranks."""

import numpy as np
import pytest

from stablelora_jax import LoraSpec, rate_factor

SPECS = {
    1.0: [LoraSpec(rank=8, alpha=16), LoraSpec(rank=128, alpha=16)],
    16**-0.5: [LoraSpec(rank=8, alpha=8), LoraSpec(rank=128, alpha=128)],
    16**-0.25: [LoraSpec(rank=8, alpha=16, scaling="rslora"), LoraSpec(rank=128, alpha=16, scaling="rslora")],
    8**-0.25: [LoraSpec(rank=8, alpha=16), LoraSpec(rank=8, alpha=16, scaling="rslora")],
}


@pytest.mark.parametrize("factor", SPECS)
def test_two_sign_steps_change_the_outputs_as_much_at_every_rank(factor):
    tuned, spec = SPECS[factor]
    assert rate_factor(tuned, spec) == pytest.approx(factor)
    n, changes = 64, []
    for found, rate in ((tuned, 1e-3), (spec, 1e-3 * rate_factor(tuned, spec))):
        rng = np.random.default_rng(0)
        x, a, g = np.sign(rng.normal(size=n)), rng.normal(size=(n, found.rank)), rng.normal(size=5)
        b = -rate * np.sign(np.outer(g, x @ a))  # (out, r), the gradient of one sample's kernel is x g^T
        step = -rate * np.sign(np.outer(x, g @ b))
        changes.append(found.scale_of("any") * x @ step @ b.T)
    np.testing.assert_allclose(*np.abs(changes))
