"""How the terms of a LoRA step scale with the width n of a layer (Stable-LoRA, arXiv 2603.05204, section 3).

One layer ``y = s (x A) B`` with A (n, r), B (r, n) and ``A ~ N(0, 1/n)``, ``B = 0`` at the start; the base kernel is
zero. Each step draws a fresh batch: latent ``z ~ N(0, I)`` of 64 values, input ``x = z C / 8``, target ``z U / 8``,
with Gaussian C and U (64, n). The loss is half of the *sum* of squares, and Adam's eps is 1e-30: with a mean, gradients
would shrink as 1/n, and an eps would bend the slopes.

A config is a power law: ``eta = e0 (n / 256)^p`` for the learning rates of A and B, and ``s = 2 (n / 256)^q``. With
``q = -2 p - 1`` delta2 and delta3 do not depend on the width. delta1 grows with it where ``p < -1``, unless A starts
small or is shrunk.

Everything is float64, whatever the process has configured, and is compiled once for each width and optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax.optimizers import latches, lora_plus, stable_lora
from stablelora_jax.optimizers.stable_lora import OFF
from stablelora_jax.training.stability import shrunk_adapters

RANK, BATCH, LATENT = 8, 32, 64
REFERENCE = 256  # the width at which eta = e0 and s = 2 in every config
SMALLEST = 64  # the width at which an A that starts small is as large as any other
EPS = 1e-30  # of Adam


@dataclass(frozen=True)
class Config:
    """Exponents in n, and what is done about A."""

    name: str
    eta: float  # exponent of A's learning rate, and of B's unless eta_b is given
    scale: float  # exponent of s
    optimizer: str = "adam"  # or stable_lora, lora_plus
    a0: float = 0.0  # A starts at (n / 64)^a0 times its usual size
    eta_b: float | None = None
    e0: float = 5e-4
    shrink_ratio: float = 0.0  # lambda of Stable-LoRA

    @property
    def b_exponent(self) -> float:
        """Exponent of B's learning rate."""
        return self.eta if self.eta_b is None else self.eta_b


class Size(NamedTuple):
    """How much a study computes."""

    widths: tuple[int, ...]
    steps: int
    seeds: int
    configs: tuple[Config, ...]


class Numbers(NamedTuple):
    """What a compiled run takes for the config."""

    eta: Any  # A's learning rate
    ratio: Any  # B's learning rate over A's
    scale: Any  # s
    a0: Any  # factor on the initial A
    shrink_ratio: Any


class Terms(NamedTuple):
    """What a step changes at the layer's output, each (batch, n)."""

    delta1: jax.Array  # s x A' dB
    delta2: jax.Array  # s x dA B
    delta3: jax.Array  # s x dA dB
    shrink: jax.Array  # s x (A - A') B


def three(name: str, eta: float, scale: float, e0: float = 5e-4) -> tuple[Config, ...]:
    """A regime with Adam, with Stable-LoRA (lambda = 0.02), and with Adam from an A that is small from the start."""
    end = "" if e0 == 5e-4 else f", e0 = {e0:g}"
    return (
        Config(f"{name} Adam{end}", eta, scale, e0=e0),
        Config(f"{name} Stable-LoRA{end}", eta, scale, "stable_lora", shrink_ratio=0.02, e0=e0),
        Config(f"{name} small A{end}", eta, scale, a0=eta + 1, e0=e0),
    )


FULL = (
    Config("R1 Adam", -0.5, 0.0),
    *three("R2", -1.5, 2.0),
    *three("R3", -2.0, 3.0),
    Config("LoRA+ scaling", -1.0, 0.0, "lora_plus", eta_b=0.0),
    Config("constant eta, s", 0.0, 0.0),
    *three("R3", -2.0, 3.0, e0=1e-4),
)
SIZES = {
    "full": Size((64, 128, 256, 512, 1024, 2048, 4096), 600, 2, FULL),
    "test": Size((64, 128, 256, 512), 400, 2, three("R3", -2.0, 3.0, e0=1e-4)),
}


def measure(config: Config, width: int, seed: int, steps: int) -> dict[str, np.ndarray]:
    """Train one layer and measure every step.

    Args:
      config: the scaling and the optimizer.
      width: n, the number of inputs and of outputs.
      seed: of the task, of A and of the batches.
      steps: of training.

    Returns:
      Arrays (steps,), float64, measured on the batch of the step: ``delta1``, ``delta2``, ``delta3``, ``shrink``, the
      RMS over batch and outputs of the :class:`Terms`; ``az``, RMS of x A, and ``b``, RMS of B, after the step;
      ``a_step``, RMS of x dA over A's learning rate; ``loss``, half of the mean square before the step; and
      ``stopped``, bool, whether A shrinks no more (False where it never shrinks).
    """
    n = width / REFERENCE
    numbers = Numbers(
        eta=config.e0 * n**config.eta,
        ratio=n ** (config.b_exponent - config.eta),
        scale=2 * n**config.scale,
        a0=(width / SMALLEST) ** config.a0,
        shrink_ratio=config.shrink_ratio,
    )
    with jax.enable_x64(True):
        found = _run(config.optimizer, width, steps, seed, Numbers(*map(np.float64, numbers)))
        return {name: np.asarray(values) for name, values in found.items()}


@partial(jax.jit, static_argnames=("optimizer", "width", "steps"))
def _run(optimizer: str, width: int, steps: int, seed: Any, numbers: Numbers) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 4)
    mix, teach = (jax.random.normal(key, (LATENT, width)) / 8 for key in keys[:2])
    a = numbers.a0 * jax.random.normal(keys[2], (width, RANK)) / width**0.5
    adapters = {"layer": {"lora_a": a, "lora_b": jnp.zeros((RANK, width))}}
    tx = make_optimizer(optimizer, numbers)

    def step(carry: Any, count: jax.Array) -> Any:
        z = jax.random.normal(jax.random.fold_in(keys[3], count), (BATCH, LATENT))
        adapters, state = carry
        return train_step(tx, numbers, adapters, state, z @ mix, z @ teach)

    return jax.lax.scan(step, (adapters, tx.init(adapters)), jnp.arange(steps))[1]  # type: ignore[no-any-return]


def make_optimizer(name: str, numbers: Numbers) -> optax.GradientTransformation:
    """The optimizer itself, without weight decay."""
    if name == "stable_lora":
        return stable_lora(numbers.eta, numbers.shrink_ratio, eps=EPS, weight_decay=0.0)
    if name == "lora_plus":
        return lora_plus(numbers.eta, numbers.ratio, eps=EPS)
    return optax.adam(numbers.eta, eps=EPS)


def train_step(
    tx: optax.GradientTransformation, numbers: Numbers, adapters: Any, state: Any, x: jax.Array, y: jax.Array
) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
    """One step on inputs ``x`` and targets ``y``, (batch, n): ((adapters, state), what is measured)."""

    def loss_fn(adapters: Any) -> jax.Array:
        pair = adapters["layer"]
        return 0.5 * jnp.sum(jnp.square(numbers.scale * (x @ pair["lora_a"]) @ pair["lora_b"] - y))

    loss, gradients = jax.value_and_grad(loss_fn)(adapters)
    updates, state = tx.update(gradients, state, adapters)
    after: Any = optax.apply_updates(adapters, updates)
    shrunk = shrunk_adapters(adapters, state, numbers.shrink_ratio)
    measured = {name: rms(term) for name, term in terms(adapters, shrunk, after, numbers.scale, x)._asdict().items()}
    a, small, b = after["layer"]["lora_a"], shrunk["layer"]["lora_a"], after["layer"]["lora_b"]
    measured |= {"az": rms(x @ a), "b": rms(b), "a_step": rms(x @ (a - small)) / numbers.eta, "loss": loss / y.size}
    stopped = [latch == OFF for found in latches(state) for latch in jax.tree.leaves(found.shrinking)]
    return (after, state), measured | {"stopped": jnp.asarray(stopped, bool).any()}


def terms(before: Any, shrunk: Any, after: Any, scale: Any, x: jax.Array) -> Terms:
    """The terms of the step from ``before`` to ``after`` on inputs ``x`` (batch, n).

    ``delta1 + delta2 + delta3 - shrink == s (x A_new B_new - x A B)``, where ``shrunk`` has A' = (1 - lambda) A.
    """
    (a, b), (small, _), (new_a, new_b) = (
        (tree["layer"]["lora_a"], tree["layer"]["lora_b"]) for tree in (before, shrunk, after)
    )
    kept, moved, lost = scale * (x @ small), scale * (x @ (new_a - small)), scale * (x @ (a - small))
    return Terms(kept @ (new_b - b), moved @ b, moved @ (new_b - b), lost @ b)


def rms(values: jax.Array) -> jax.Array:
    """Root mean square over all axes."""
    return jnp.sqrt(jnp.square(values).mean())
