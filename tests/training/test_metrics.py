"""Norms over pairs, and the ratios of the stop rule."""

import jax.numpy as jnp
import numpy as np

from stablelora_jax import LoraSpec
from stablelora_jax.optimizers import stable_lora, still_shrinking
from stablelora_jax.training.metrics import norm_summary, ratios_by_name, stop_ratios


def test_norms_leave_padding_out():
    rng = np.random.default_rng(0)
    stack = {"lora_a": rng.normal(size=(3, 4, 2)), "lora_b": rng.normal(size=(3, 2, 5))}
    stack = {name: leaf * np.array([1, 0, 1])[:, None, None] for name, leaf in stack.items()}
    single = {"lora_a": rng.normal(size=(6, 2)), "lora_b": np.zeros((2, 3))}
    summary = norm_summary(
        {"x": {k: jnp.asarray(v) for k, v in stack.items()}, "y": {k: jnp.asarray(v) for k, v in single.items()}}
    )
    for letter in "ab":
        name = f"lora_{letter}"
        norms = [np.linalg.norm(stack[name][0]), np.linalg.norm(stack[name][2]), np.linalg.norm(single[name])]
        expected = (np.mean(norms), np.min(norms), np.max(norms))
        np.testing.assert_allclose(
            [summary[f"norm_{letter}{end}"] for end in ("", "_min", "_max")], expected, rtol=1e-5
        )


def test_a_pair_whose_a_is_zero_counts():
    summary = norm_summary({"x": {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.ones((2, 8))}})
    assert summary["norm_b"] == summary["norm_b_min"] == 4 and summary["norm_a_min"] == 0


def test_the_ratio_falls_below_one_just_where_the_latch_falls():
    """What is recorded is the stop rule's own test, pair by pair; padding of a stack has no ratio."""
    rng = np.random.default_rng(1)
    ranks, sizes = np.array([1, 0, 1, 1]), np.array([1, 1, 0.1, 8])  # the second layer is padding
    pair = {"lora_a": rng.normal(size=(4, 6, 2)), "lora_b": rng.normal(size=(4, 2, 9)) * sizes[:, None, None]}
    adapters = {"layers": {"q_proj": {k: jnp.asarray(v * ranks[:, None, None]) for k, v in pair.items()}}}
    spec = LoraSpec(rank=2, target_modules=("q_proj",), layers_to_transform=(0, 2, 3))
    found = ratios_by_name(stop_ratios(adapters), spec)
    norms = {k: np.linalg.norm(v, axis=(1, 2)) for k, v in pair.items()}
    expected = (norms["lora_a"] / 6) / (norms["lora_b"] / 9)
    np.testing.assert_allclose(list(found.values()), expected[[0, 2, 3]], rtol=1e-6)
    tx = stable_lora(1e-3, 1e-3)
    state = tx.update(adapters, tx.init(adapters), adapters)[1]
    assert still_shrinking(state) == {name: ratio >= 1 for name, ratio in found.items()}
    assert set(still_shrinking(state).values()) == {True, False}
    none = {"x": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 8))}}
    assert stop_ratios(none)[("x",)] == np.inf
