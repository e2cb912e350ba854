"""EVA's ranks: the budget is kept, the largest shares win, and what is left of a spec means what it did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, init_adapters
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.rank_allocation.eva import explained_variance, redistributed, with_ranks
from stablelora_jax.utils import tree
from tests.helpers import tiny_decoder


def test_the_largest_shares_have_the_budget():
    """Against a sort of all of them in NumPy."""
    rng = np.random.default_rng(0)
    shares = {f"m{i}": np.sort(rng.random(12))[::-1] for i in range(5)}
    ranks = {"m0": 2, "m1": 4, "m2": 4, "m3": 3, "m4": 1}
    found = redistributed(shares, ranks, rho=2.0)
    assert sum(found.values()) == sum(ranks.values())
    least = np.sort(np.concatenate([shares[name][: 2 * rank] for name, rank in ranks.items()]))[-14]
    for name, rank in ranks.items():
        assert found[name] == (shares[name][: 2 * rank] >= least).sum() <= 2 * rank
    assert redistributed(shares, ranks, rho=1.0) == ranks


@pytest.mark.parametrize("rho,why", [(0.5, "rho must be at least 1"), (1.0, "fewer than the 40")])
def test_what_cannot_be_shared_out(rho, why):
    with pytest.raises(InputError, match=why):
        redistributed({"q": np.ones(3)}, {"q": 40}, rho)


def test_a_model_of_redistributed_ranks():
    """From a calibration to adapters: layers differ in rank, one has none, and every alpha / r is as it was."""
    _, params = tiny_decoder()
    spec = LoraSpec(rank=2, alpha=6, init="eva", target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 8})
    found = {}
    for path, target in find_target_modules(params, spec).items():
        axes = np.zeros((*target.stack, *target.size), np.float32)
        large = [[4, 3, 2, 1], [0.2, 0.1, 0.1, 0.1], [3, 3, 0.1, 0.1]] if path[-1] == "q_proj" else [[1, 1, 1, 1]] * 3
        for layer, own in enumerate(large):
            axes[layer, np.arange(4), np.arange(4)] = own
        total = np.square(axes).sum(axis=(1, 2)) * (1 if path[-1] == "q_proj" else 9)
        found = tree.set_in(found, path, {"inputs": axes, "variance": total})
    shares = explained_variance(found, spec)
    assert len(shares) == 6
    np.testing.assert_allclose(shares["model.layers.0.self_attn.q_proj"][:4], np.array([16, 9, 4, 1]) / 30, rtol=1e-6)
    ranks = redistributed(shares, {name: spec.rank_of(name) for name in shares})
    assert sum(ranks.values()) == 12 and ranks["model.layers.2.mlp.down_proj"] == 0
    after = with_ranks(spec, ranks)
    for path, target in find_target_modules(params, after).items():
        assert dict(zip(target.names, target.ranks, strict=True)) == {name: ranks[name] for name in target.names}
        used = [scale for scale, rank in zip(target.scales, target.ranks, strict=True) if rank]
        assert used == [4.0 if path[-1] == "q_proj" else 3.0] * len(used)
    adapters = init_adapters(jax.random.key(0), params, after, calibration=jax.tree.map(jnp.asarray, found))
    a = adapters["model"]["layers"]["self_attn"]["q_proj"]["lora_a"]
    for layer in range(3):
        rank = ranks[f"model.layers.{layer}.self_attn.q_proj"]
        np.testing.assert_allclose(a[layer].T @ a[layer], np.diag(np.arange(a.shape[-1]) < rank), atol=1e-6)


def test_names_that_patterns_cannot_tell_apart():
    with pytest.raises(InputError, match="no pattern tells blocks.fc.1. from its neighbours"):
        with_ranks(LoraSpec(), {"blocks.fc[0]": 1, "blocks.fc[1]": 2})
    with pytest.raises(InputError, match="all ranks are 0"):
        with_ranks(LoraSpec(), {"q_proj": 0})
    with pytest.raises(InputError, match="holds no inputs"):
        explained_variance({"q_proj": {"gradient": 1}}, LoraSpec())
    spec = LoraSpec(exclude_modules=".*v_proj")
    assert with_ranks(spec, {"a.q_proj": 2, "b.q_proj": 0}).exclude_modules == r"(?:.*v_proj)|b\.q_proj"
