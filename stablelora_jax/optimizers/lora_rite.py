"""LoRA-RITE: transformation-invariant matrix preconditioning (Yen et al., ICLR 2025, arXiv 2410.20625, Algorithm 1).

For A, with B = Q R, Q an orthonormal basis of B's columns (and for B likewise, with the basis of A)::

    u   = gA pinv(R)                      the unmagnified gradient, s G Q: it does not see how A B^T is factored
    P   = Q^T Q_old                       last step's coordinates to this step's
    V'  = P V P^T;  rho <- b2^ (rho + min(max_i (lam_i(V) - lam_i(V'))+, (tr V - tr V')+))      what the basis lost
    V   = (1 - b2^) u^T u + b2^ V'
    M   = (1 - b1^) u (V + rho I)^-1/2 + b1^ M P^T
    A  <- A - eta (M pinv(R)^T + w A)

``b^ = b (1 - b^(t-1)) / (1 - b^t)`` folds Adam's bias correction in; ``X^-1/2 = U diag(1 / (sqrt(lam) + eps)) U^T``.
The whole trajectory of A B^T is the same for every factorisation. Any orthonormal basis serves: it comes from eigh.

The authors' PyTorch port differs, and ``variant="code"`` is what it does by default: u^T u is divided by the number of
rows, the escaped mass rho is off, a factor whose u has an RMS above ``update_skipping = 1`` is silently skipped, and
all u together are clipped to the norm ``clip_unmagnified_grad = 1``. (Its ``balance_param`` is not offered.) The
paper's best learning rates are about twenty times Adam's: sweep a higher grid.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, pairwise, used
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.linalg import eigh, gram, orthonormal, safe_scale, symmetric, transpose
from stablelora_jax.optimizers.pair_tree import others_by_adamw
from stablelora_jax.utils.errors import InputError


class RiteState(NamedTuple):
    """State of a pair; ``.a`` belongs to A, whose coordinates are those of B's basis."""

    mu: Pair  # first moments M (..., n, r), (..., m, r)
    nu: Pair  # second moments V (..., r, r)
    basis: Pair  # last step's orthonormal bases of A (..., n, r) and of B (..., m, r)
    escaped: Pair  # rho (...)


class Options(NamedTuple):
    """Numbers of the rule; see :func:`lora_rite`."""

    b1: Any
    b2: Any
    eps: Any
    escape: Any
    clip: Any
    skip: Any
    cap: Any
    mean: bool  # divide u^T u by its rows


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    escape: float | None = None,
    clip_unmagnified_grad: float | None = None,
    update_skipping: float | None = None,
    update_capping: float = 0.0,
    variant: Literal["paper", "code"] = "paper",
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE; leaves outside pairs get AdamW at the same rate.

    Args:
      learning_rate: scalar or schedule.
      b1: decay of the first moment.
      b2: decay of the second moment and of the escaped mass.
      eps: added to the root of the eigenvalues of the second moment.
      weight_decay: decoupled, scalar or schedule.
      escape: weight of the escaped mass, 1 or 0; None for the variant's: 1 in the paper, 0 in the code.
      clip_unmagnified_grad: largest norm of all u together, 0 for none; None for the variant's: 0, in the code 1.
      update_skipping: largest RMS of a factor's u, beyond which it counts as 0, 0 for none; None as above.
      update_capping: largest RMS of a factor's M, 0 for none.
      variant: the paper's rule or the defaults of the authors' port.

    Raises:
      InputError: a number out of range, an unknown variant; in ``init``, what makes no pair.
    """
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay)
    transform = scale_by_lora_rite(
        b1, b2, eps, escape, clip_unmagnified_grad, update_skipping, update_capping, variant=variant
    )
    chained = optax.chain(
        transform, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )
    return of_pairs(others_by_adamw(chained, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))


def scale_by_lora_rite(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    escape: float | None = None,
    clip_unmagnified_grad: float | None = None,
    update_skipping: float | None = None,
    update_capping: float = 0.0,
    variant: Literal["paper", "code"] = "paper",
) -> optax.GradientTransformationExtraArgs:
    """The direction ``M pinv(R)^T`` of :func:`lora_rite`, before decay and learning rate; other leaves pass."""
    if variant not in ("paper", "code"):
        raise InputError(f"variant must be paper or code, not {variant!r}")
    code = variant == "code"
    escape = float(not code) if escape is None else float(escape) if isinstance(escape, bool) else escape
    clip = float(code) if clip_unmagnified_grad is None else clip_unmagnified_grad
    skip = float(code) if update_skipping is None else update_skipping
    require_numbers(b1=b1, b2=b2, eps=eps, escape=escape, update_capping=update_capping)
    require_numbers(clip_unmagnified_grad=clip, update_skipping=skip)
    options = Options(b1, b2, eps, escape, clip, skip, update_capping, code)

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, RiteState]]:
        del extra
        return _update(groups, count + 1, options)

    return of_pairs(pairwise(_first_state, update))


def _first_state(pair: Pair) -> RiteState:
    def squares() -> Pair:
        return Pair(*(jnp.zeros((*x.shape[:-2], x.shape[-1], x.shape[-1]), x.dtype) for x in pair))

    def zeros() -> Pair:
        found: Pair = jax.tree.map(jnp.zeros_like, pair)
        return found

    return RiteState(zeros(), squares(), zeros(), Pair(*(jnp.zeros(x.shape[:-2], x.dtype) for x in pair)))


class Side(NamedTuple):
    """One factor of every pair of a group, A or B, with the basis of the *other* one, in which its moments are."""

    grad: jax.Array  # (P, n, r)
    basis: jax.Array  # (P, m, r) of the other factor, now
    inverse: jax.Array  # (P, r, r) pinv(R) of the other factor
    change: jax.Array  # (P, r, r) from the coordinates of the last step to those of this one
    mu: jax.Array
    nu: jax.Array
    escaped: jax.Array
    width: jax.Array  # (P,) columns in use


def _sides(groups: Sequence[Group]) -> list[Side]:
    """A's side, then B's, of each group."""
    bases = orthonormal([x for g in groups for x in (g.params.b, g.params.a)])
    old = [x for g in groups for x in (g.state.basis.b, g.state.basis.a)]
    changes = [transpose(q) @ q_old for (q, _), q_old in zip(bases, old, strict=True)]
    widths = [used(g.params).sum(-1) for g in groups for _ in g.params]
    own = [side for g in groups for side in zip(g.grads, g.state.mu, g.state.nu, g.state.escaped, strict=True)]
    return [
        Side(grad, basis, inverse, change, mu, nu, escaped, width)
        for (grad, mu, nu, escaped), (basis, inverse), change, width in zip(own, bases, changes, widths, strict=True)
    ]


def _update(groups: Sequence[Group], t: jax.Array, o: Options) -> list[tuple[Pair, RiteState]]:
    sides = _sides(groups)
    decay1, decay2 = (b * (1 - b ** (t - 1.0)) / (1 - b**t) for b in (o.b1, o.b2))
    u = _clipped([_skipped(s.grad @ s.inverse, s.width, o.skip) for s in sides], o.clip)
    carried = [symmetric(s.change @ s.nu @ transpose(s.change)) for s in sides]
    lost = _lost([s.nu for s in sides], carried, o.escape)
    escaped = [decay2 * (s.escaped + more) for s, more in zip(sides, lost, strict=True)]
    fresh = [gram(x) / (x.shape[-2] if o.mean else 1) for x in u]
    nu = [(1 - decay2) * new + decay2 * v for new, v in zip(fresh, carried, strict=True)]
    results = []
    for s, x, v, rho, psi in zip(sides, u, nu, escaped, _psi(nu, escaped, o), strict=True):
        mu = (1 - decay1) * x @ psi + decay1 * s.mu @ transpose(s.change)
        results.append((_capped(mu, s.width, o.cap) @ transpose(s.inverse), mu, v, s.basis, rho))
    return [_join(of_a, of_b) for of_a, of_b in zip(results[::2], results[1::2], strict=True)]


def _join(of_a: Any, of_b: Any) -> tuple[Pair, RiteState]:
    """Step and state of both sides; A's side holds B's basis."""
    (step_a, mu_a, nu_a, basis_b, escaped_a), (step_b, mu_b, nu_b, basis_a, escaped_b) = of_a, of_b
    state = RiteState(Pair(mu_a, mu_b), Pair(nu_a, nu_b), Pair(basis_a, basis_b), Pair(escaped_a, escaped_b))
    return Pair(step_a, step_b), state


def _skipped(u: jax.Array, width: jax.Array, skip: Any) -> jax.Array:
    if _off(skip):
        return u
    return jnp.where((_rms(u, width) > skip) & (jnp.asarray(skip) > 0), 0, u)


def _clipped(u: list[jax.Array], clip: Any) -> list[jax.Array]:
    if _off(clip):
        return u
    scale = functools.reduce(jnp.maximum, (safe_scale(x).max() for x in u))
    norm = scale * jnp.sqrt(sum(jnp.sum((x / scale) ** 2) for x in u))
    factor = jnp.where((norm > clip) & (jnp.asarray(clip) > 0), clip / jnp.where(norm > 0, norm, 1), 1)
    return [x * factor.astype(x.dtype) for x in u]


def _capped(m: jax.Array, width: jax.Array, cap: Any) -> jax.Array:
    return m if _off(cap) else jnp.where(jnp.asarray(cap) > 0, m / jnp.maximum(1, _rms(m, width) / cap), m)


def _lost(before: list[jax.Array], after: list[jax.Array], escape: Any) -> list[jax.Array]:
    """What each second moment lost by the change of basis, (P,): the lesser of eigenvalue and trace, not below 0."""
    if _off(escape):
        return [jnp.zeros(v.shape[:-2], v.dtype) for v in before]
    values = [found for found, _ in eigh([*before, *after])]
    lost = []
    for v, w, old, new in zip(before, after, values[: len(before)], values[len(before) :], strict=True):
        traces = jnp.trace(v, axis1=-2, axis2=-1) - jnp.trace(w, axis1=-2, axis2=-1)
        lost.append(escape * jnp.clip(jnp.minimum((old - new).max(-1), traces), 0))
    return lost


def _psi(nu: list[jax.Array], escaped: list[jax.Array], o: Options) -> list[jax.Array]:
    found = []
    for (values, vectors), rho in zip(eigh(nu), escaped, strict=True):
        root = jnp.sqrt(jnp.maximum(values + rho[..., None], 0)) + o.eps
        found.append((vectors / jnp.where(root > 0, root, 1)[..., None, :]) @ transpose(vectors))
    return found


def _rms(x: jax.Array, width: jax.Array) -> jax.Array:
    """Root mean square over the columns in use, (P, 1, 1)."""
    count = jnp.maximum(x.shape[-2] * width, 1)[:, None, None]
    return jnp.sqrt(jnp.sum(x**2, axis=(-2, -1), keepdims=True) / count)


def _off(number: Any) -> bool:
    return isinstance(number, int | float) and number == 0
