"""The axis of optimisation dynamics: ``optax.GradientTransformation``s over trees that contain pairs. One file each."""

from stablelora_jax.optimize.stable import (
    ShrinkUntilStableState,
    latches,
    shrink_until_stable,
    stable_lora,
    still_shrinking,
)

__all__ = ["ShrinkUntilStableState", "latches", "shrink_until_stable", "stable_lora", "still_shrinking"]
