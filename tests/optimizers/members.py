"""The members of the optimizer axis: one row each, from which every law in this directory is tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import pytest

from stablelora_jax import optimizers

# which changes of factorisation (A, B) -> (A R, B R^-T) leave the trajectory of A B^T as it is
NONE, SIGN, PERMUTATION, ORTHOGONAL, GENERAL = range(5)


class Member(NamedTuple):
    """One optimizer with fixed options."""

    factory: Callable[..., optax.GradientTransformation]
    rule: str  # its function in oracles.py
    symmetry: int  # the largest group it respects
    numbers: Callable[[int, int, int], int]  # floats of state for one pair (in, out, rank)
    options: dict[str, Any] = {}  # of ours
    rule_options: dict[str, Any] = {}  # of the oracle, where they are called otherwise
    scaled: bool = False  # takes the LoRA scale
    first_move: bool = False  # zero gradients move the parameters at the first update
    static: tuple[str, ...] = ()  # of inject_hyperparams
    ridge: bool = False  # zero gradients move the parameters always
    tolerance: float = 1e-10  # of the float64 trajectory
    rate: float = 3e-2  # that fits the problems of test_laws

    def make(self, learning_rate: Any, scale: Any = 1.0, **more: Any) -> optax.GradientTransformation:
        """The transformation."""
        given = {**self.options, **more} | ({"scale": scale} if self.scaled else {})
        return self.factory(learning_rate, **given)


def adam(n: int, m: int, r: int) -> int:
    """Both moments of both factors."""
    return 2 * r * (n + m)


def first_moments(n: int, m: int, r: int) -> int:
    """The first moments of both factors."""
    return r * (n + m)


def row_squares(n: int, m: int, r: int) -> int:
    """First moments, the last factors, and second moments of (r, r) for each row."""
    return (2 * r + r * r) * (n + m)


def rite(n: int, m: int, r: int) -> int:
    """First moments, bases, second moments and the escaped mass of both factors."""
    return 2 * r * (n + m) + 2 * r * r + 2


def nothing(n: int, m: int, r: int) -> int:
    """No state."""
    return 0


MEMBERS = {
    "stable_lora": Member(
        optimizers.stable_lora, "stable_lora", PERMUTATION, adam, {"shrink_ratio": 5e-3}, {"ratio": 5e-3}
    ),
    "lora_plus": Member(optimizers.lora_plus, "lora_plus", PERMUTATION, adam, {"ratio": 4.0}),
    "scaled_gd": Member(optimizers.scaled_gd, "scaled_gd", GENERAL, nothing, {"delta": 0.0}),
    "scaled_gd_damped": Member(optimizers.scaled_gd, "scaled_gd", ORTHOGONAL, nothing, {"delta": 1e-2}, rate=0.1),
    "scaled_adamw": Member(optimizers.scaled_adamw, "scaled_adamw", PERMUTATION, adam, {"b2": 0.9}),
    "scaled_adamw_gpt2": Member(
        optimizers.scaled_adamw, "scaled_adamw", PERMUTATION, adam, {"variant": "gpt2", "delta": 1e-2}
    ),
    "scaled_adamw_mistral": Member(
        optimizers.scaled_adamw, "scaled_adamw", PERMUTATION, adam, {"variant": "mistral", "delta": 1e-2}
    ),
    "lora_rite": Member(optimizers.lora_rite, "lora_rite", GENERAL, rite, {}, {"escape": True}),
    "lora_rite_no_escape": Member(optimizers.lora_rite, "lora_rite", GENERAL, rite, {"escape": 0}, {"escape": False}),
    "lora_rite_code": Member(
        optimizers.lora_rite,
        "lora_rite",
        GENERAL,
        rite,
        {"variant": "code"},
        {"escape": False, "second_moment": "mean", "clip": 1.0, "skip": 1.0, "variant": None},
    ),
    "lora_rite_all": Member(
        optimizers.lora_rite,
        "lora_rite",
        GENERAL,
        rite,
        {
            "variant": "code",
            "escape": True,
            "clip_unmagnified_grad": 0.5,
            "update_skipping": 0.4,
            "update_capping": 0.9,
        },
        {
            "escape": True,
            "second_moment": "mean",
            "clip": 0.5,
            "skip": 0.4,
            "cap": 0.9,
            "variant": None,
            "clip_unmagnified_grad": None,
            "update_skipping": None,
            "update_capping": None,
        },
    ),
    "lora_pro": Member(optimizers.lora_pro, "lora_pro", PERMUTATION, adam, scaled=True),
    "lora_pro_zero": Member(optimizers.lora_pro, "lora_pro", PERMUTATION, adam, {"projection": "zero"}, scaled=True),
    "lora_pro_symmetric": Member(
        optimizers.lora_pro, "lora_pro", PERMUTATION, adam, {"projection": "symmetric"}, scaled=True
    ),
    "lora_pro_full": Member(
        optimizers.lora_pro, "lora_pro", ORTHOGONAL, lambda n, m, r: 2 * n * m, {"form": "full"}, scaled=True
    ),
    "lora_pro_full_zero": Member(
        optimizers.lora_pro,
        "lora_pro",
        GENERAL,
        lambda n, m, r: 2 * n * m,
        {"form": "full", "projection": "zero", "damping": 0.0, "variant": "code"},
        scaled=True,
    ),
    "altlora": Member(optimizers.altlora, "altlora", GENERAL, adam, {"lam": 0.0, "first": "b"}, scaled=True, rate=0.1),
    "altlora_a_first": Member(optimizers.altlora, "altlora", ORTHOGONAL, adam, {"lam": 1e-1}, scaled=True),
    "altlora_code": Member(optimizers.altlora, "altlora", GENERAL, adam, {"variant": "code", "lam": 0.0}),
    "altlora_plus": Member(
        optimizers.altlora_plus,
        "altlora",
        PERMUTATION,
        lambda n, m, r: 3 * r * (n + m),
        {"eps": 1e-3},
        {"plus": True},
        scaled=True,
        rate=3e-3,
    ),
    "altlora_plus_code": Member(
        optimizers.altlora_plus,
        "altlora",
        PERMUTATION,
        lambda n, m, r: 3 * r * (n + m),
        {"variant": "code", "eps": 1e-3},
        {"plus": True},
    ),
    "allora": Member(optimizers.allora, "allora", PERMUTATION, adam),
    "allora_update": Member(
        optimizers.allora,
        "allora",
        PERMUTATION,
        adam,
        {"applies_to": "update"},
        {"on": "update", "applies_to": None},
    ),
    "balora": Member(optimizers.balora, "balora", SIGN, adam, static=("every",)),
    "balora_seldom": Member(optimizers.balora, "balora", SIGN, adam, {"every": 3}, static=("every",)),
    "loft": Member(optimizers.loft, "loft", ORTHOGONAL, row_squares, {"lam": 1e-2, "eps": 1e-4}, scaled=True),
    "loft_exact": Member(
        optimizers.loft, "loft", GENERAL, row_squares, {"lam": 0.0, "b2": 0.9, "eps": 1e-2}, scaled=True
    ),
    "lora_muon": Member(optimizers.lora_muon, "lora_muon", GENERAL, first_moments, {"damping": 0.0}, scaled=True),
    "lora_muon_damped": Member(
        optimizers.lora_muon, "lora_muon", ORTHOGONAL, first_moments, {"damping": 1e-1, "momentum": 0.7}, scaled=True
    ),
    "oplora": Member(
        optimizers.oplora,
        "oplora",
        ORTHOGONAL,
        lambda n, m, r: r * (n + m),
        {"lam": 1e-1},
        {"rounds": 2, "momentum": 0.9},
        scaled=True,
        static=("rounds",),
        rate=0.1,
    ),
    "oplora_exact": Member(
        optimizers.oplora,
        "oplora",
        GENERAL,
        lambda n, m, r: r * (n + m),
        {"lam": 0.0},
        {"rounds": 2, "momentum": 0.9},
        scaled=True,
        static=("rounds",),
    ),
    "oplora_plain": Member(
        optimizers.oplora,
        "oplora",
        GENERAL,
        nothing,
        {"momentum": None, "rounds": 1, "lam": 0.0},
        scaled=True,
        static=("rounds",),
    ),
    "oplora_ridge": Member(
        optimizers.oplora,
        "oplora",
        ORTHOGONAL,
        nothing,
        {"momentum": None, "lam": 1e-2, "regularization": "ridge"},
        {"rounds": 2, "ridge": True, "regularization": None},
        scaled=True,
        static=("rounds",),
        ridge=True,
    ),
    "lora_pre": Member(
        optimizers.lora_pre,
        "lora_pre",
        PERMUTATION,
        lambda n, m, r: 2 * 2 * (n + m + 2 * r),
        {"rank": 2},
        static=("rank", "seed"),
        tolerance=1e-7,  # Newton steps on |g| invert Gram matrices of condition 1e6 and more, in the oracle too
    ),
    "stiefel_lora": Member(
        optimizers.stiefel_lora, "stiefel_lora", SIGN, lambda n, m, r: r * (2 * n + m), {}, {}, first_move=True
    ),
    "lora_fa": Member(optimizers.lora_fa, "lora_fa", PERMUTATION, lambda n, m, r: 2 * r * m),
    "lora_fa_peft": Member(
        optimizers.lora_fa, "lora_fa", PERMUTATION, lambda n, m, r: 2 * r * m, {"variant": "peft"}, scaled=True
    ),
}


def rule_options(member: Member) -> dict[str, Any]:
    """The oracle's options: ours, renamed or left out as the row says."""
    merged = {**member.options, **member.rule_options}
    if member.rule == "stable_lora":
        merged.pop("shrink_ratio")
    return {key: number for key, number in merged.items() if number is not None or key == "momentum"}


def pair_of(a: Any, b: Any, dtype: Any = None) -> dict[str, Any]:
    """Our pair from the sheet's factors A (r, n), B (m, r)."""
    return {"lora_a": jnp.asarray(a, dtype).swapaxes(-1, -2), "lora_b": jnp.asarray(b, dtype).swapaxes(-1, -2)}


# one row for each algorithm, for laws that take long to compile
CORE = [
    "stable_lora",
    "lora_plus",
    "scaled_gd_damped",
    "scaled_adamw",
    "scaled_adamw_gpt2",
    "lora_rite",
    "lora_rite_all",
    "lora_pro",
    "lora_pro_full",
    "altlora",
    "altlora_plus",
    "allora",
    "balora",
    "loft",
    "lora_muon",
    "oplora",
    "lora_pre",
    "stiefel_lora",
    "lora_fa",
    "lora_fa_peft",
]

# where optax's wrappers are tested, which see no rule of a member: the other rows of CORE take ``--long``
WRAPPED = ["stable_lora", "lora_plus", "scaled_adamw", "lora_pro", "oplora", "stiefel_lora", "lora_fa"]


def some(few, rows):
    """``rows`` as parameters, those outside ``few`` marked ``long``."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.long) for name in rows]
