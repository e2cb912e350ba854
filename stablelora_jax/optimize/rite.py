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

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.errors import InputError
from stablelora_jax.optimize.gram import eigh, gram, orthonormal, symmetric, transpose
from stablelora_jax.optimize.pairing import others_by_adamw
from stablelora_jax.optimize.pairwise import Group, Pair, pairwise, used


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
      escape: weight of the escaped mass, 1 (or True) or 0; None for the variant's: 1 in the paper, 0 in the code.
      clip_unmagnified_grad: largest norm of all u together, 0 for none; None for the variant's: 0, in the code 1.
      update_skipping: largest RMS of a factor's u, beyond which it counts as 0, 0 for none; None as above.
      update_capping: largest RMS of a factor's M, 0 for none.
      variant: the paper's rule or the defaults of the authors' port.

    Raises:
      InputError: an unknown variant; in ``init``, what makes no pair.
    """
    transform = scale_by_lora_rite(
        b1, b2, eps, escape, clip_unmagnified_grad, update_skipping, update_capping, variant=variant
    )
    chained = optax.chain(
        transform, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )
    return others_by_adamw(chained, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


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
    escape = float(not code) if escape is None else escape
    clip = float(code) if clip_unmagnified_grad is None else clip_unmagnified_grad
    skip = float(code) if update_skipping is None else update_skipping
    options = Options(b1, b2, eps, escape, clip, skip, update_capping, code)

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, RiteState]]:
        del extra
        return _update(groups, count + 1, options)

    return pairwise(_first_state, update)


def _first_state(pair: Pair) -> RiteState:
    def squares() -> Pair:
        return Pair(*(jnp.zeros((*x.shape[:-2], x.shape[-1], x.shape[-1]), x.dtype) for x in pair))

    def zeros() -> Pair:
        return jax.tree.map(jnp.zeros_like, pair)

    return RiteState(zeros(), squares(), zeros(), Pair(*(jnp.zeros(x.shape[:-2], x.dtype) for x in pair)))


def _update(groups: Sequence[Group], t: jax.Array, o: Options) -> list[tuple[Pair, RiteState]]:
    """Each pair's two factors as two entries, a's first: u in the basis of the other factor, and so on."""
    bases = orthonormal([x for g in groups for x in (g.params.b, g.params.a)])  # entry a works in the basis of B
    grads = [x for g in groups for x in g.grads]
    widths = [w for g in groups for w in [used(g.params).sum(-1)] * 2]
    u = [x @ inverse for x, (_, inverse) in zip(grads, bases, strict=True)]
    u = _clipped([_skipped(x, width, o.skip) for x, width in zip(u, widths, strict=True)], o.clip)
    old = [x for g in groups for x in (g.state.basis.b, g.state.basis.a)]
    moves = [transpose(q) @ q_old for (q, _), q_old in zip(bases, old, strict=True)]
    nu = [x for g in groups for x in g.state.nu]
    carried = [symmetric(p @ v @ transpose(p)) for p, v in zip(moves, nu, strict=True)]
    decay1, decay2 = (b * (1 - b ** (t - 1.0)) / (1 - b**t) for b in (o.b1, o.b2))
    lost = _lost(nu, carried, o.escape)
    rhos = [x for g in groups for x in g.state.escaped]
    escaped = [decay2 * (rho + more) for rho, more in zip(rhos, lost, strict=True)]
    nu = [
        symmetric((1 - decay2) * gram(x) / (x.shape[-2] if o.mean else 1) + decay2 * v)
        for x, v in zip(u, carried, strict=True)
    ]
    whitened = [x @ psi for x, psi in zip(u, _psi(nu, escaped, o), strict=True)]
    mu = [x for g in groups for x in g.state.mu]
    mu = [(1 - decay1) * x + decay1 * m @ transpose(p) for x, m, p in zip(whitened, mu, moves, strict=True)]
    steps = [
        _capped(m, width, o.cap) @ transpose(inverse) for m, width, (_, inverse) in zip(mu, widths, bases, strict=True)
    ]
    results = []
    for i in range(0, len(steps), 2):
        pair = [Pair(x[i], x[i + 1]) for x in (mu, nu, escaped)]
        basis = Pair(bases[i + 1][0], bases[i][0])
        results.append((Pair(steps[i], steps[i + 1]), RiteState(pair[0], pair[1], basis, pair[2])))
    return results


def _skipped(u: jax.Array, width: jax.Array, skip: Any) -> jax.Array:
    if _off(skip):
        return u
    return jnp.where((_rms(u, width) > skip) & (jnp.asarray(skip) > 0), 0, u)


def _clipped(u: list[jax.Array], clip: Any) -> list[jax.Array]:
    if _off(clip):
        return u
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in u))
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
