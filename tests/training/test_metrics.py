"""Norms over pairs."""

import jax.numpy as jnp
import numpy as np

from stablelora_jax.training.metrics import norm_summary


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
