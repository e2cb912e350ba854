"""The optimizers' rules in plain float64 NumPy, one pair at a time: what the library is compared with.

A is (r, n), B is (m, r), W = W0 + s B A and G = dL/dW is (m, n), so that gA = s B^T G and gB = s G A^T.
Every rule but `lora_rite` is called as `rule(a, b, gradient, rates, scale=1.0, **options)` and returns [(a_t, b_t)]
after each of the len(rates) steps; `gradient(a, b, t)` gives G at the current factors of the step t = 0, 1, ...
Decay is decoupled and uses the parameter before the step, unless a comment says otherwise.
"""

import numpy as np


def _float64(*arrays):
    return [np.array(x, dtype=np.float64) for x in arrays]


def _inverse(gram, damping):
    """(gram + damping I)^-1; the pseudo-inverse where there is no damping."""
    if damping == 0:
        return np.linalg.pinv(gram)
    return np.linalg.inv(gram + damping * np.eye(gram.shape[0]))


def _rms(x):
    return np.sqrt(np.mean(x**2))


class _Adam:
    """Both moments of one parameter and the three ways of stepping with them (section 0)."""

    def __init__(self, shape, b1, b2, eps):
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0
        self.b1, self.b2, self.eps = b1, b2, eps

    def feed(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2

    def direction(self, g):
        """Adam's step for a rate of one: bias corrected, eps outside the root."""
        self.feed(g)
        return (self.m / (1 - self.b1**self.t)) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)

    def adamw(self, p, g, rate, weight_decay):
        """AdamW: decay of the parameter before the step."""
        u = self.direction(g)
        return p - rate * weight_decay * p - rate * u

    def hf_adam(self, p, g, rate, weight_decay, correct_bias=True):
        """HFAdam: eps is not bias corrected, decay of the parameter after the step."""
        self.feed(g)
        size = rate
        if correct_bias:
            size = rate * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        p = p - size * self.m / (np.sqrt(self.v) + self.eps)
        return p - rate * weight_decay * p


def svd_truncate(t, r):
    """The best approximation of t of rank r."""
    u, s, vt = np.linalg.svd(t, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]


# Section 1. ratio=0 is AdamW.
def stable_lora(a, b, gradient, rates, scale=1.0, *, ratio=0.0, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    a, b = _float64(a, b)
    adam_a, adam_b = _Adam(a.shape, b1, b2, eps), _Adam(b.shape, b1, b2, eps)
    keep = True
    history = []
    for t in range(len(rates)):
        g = gradient(a, b, t)  # at the unshrunk factors
        ga, gb = scale * b.T @ g, scale * g @ a.T
        if keep:
            if np.linalg.norm(a) < a.size / b.size * np.linalg.norm(b):  # B before its own update
                keep = False
            else:
                a = (1 - ratio) * a
        a = adam_a.adamw(a, ga, rates[t], weight_decay)  # the decay acts on the shrunk A
        b = adam_b.adamw(b, gb, rates[t], weight_decay)
        history.append((a, b))
    return history


# Section 2.
def lora_plus(a, b, gradient, rates, scale=1.0, *, ratio=16.0, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    a, b = _float64(a, b)
    adam_a, adam_b = _Adam(a.shape, b1, b2, eps), _Adam(b.shape, b1, b2, eps)
    history = []
    for t in range(len(rates)):
        g = gradient(a, b, t)
        ga, gb = scale * b.T @ g, scale * g @ a.T
        a = adam_a.adamw(a, ga, rates[t], weight_decay)
        b = adam_b.adamw(b, gb, ratio * rates[t], weight_decay)  # decay times the group's rate too
        history.append((a, b))
    return history


# Section 3, scaled GD: both inverses from the old factors.
def scaled_gd(a, b, gradient, rates, scale=1.0, *, delta=1e-6, weight_decay=0.0):
    a, b = _float64(a, b)
    history = []
    for t in range(len(rates)):
        g = gradient(a, b, t)
        ga, gb = scale * b.T @ g, scale * g @ a.T
        ha = _inverse(b.T @ b, delta) @ ga
        hb = gb @ _inverse(a @ a.T, delta)
        a = a - rates[t] * weight_decay * a - rates[t] * ha
        b = b - rates[t] * weight_decay * b - rates[t] * hb
        history.append((a, b))
    return history


# Section 3, scaled AdamW: "paper" is Jacobi with AdamW; "gpt2" and "mistral" are the released code (HFAdam, B's
# preconditioner from the new A though gB is from the old one), mistral without any bias correction.
def scaled_adamw(
    a,
    b,
    gradient,
    rates,
    scale=1.0,
    *,
    delta=1e-6,
    weight_decay=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    variant="paper",
):
    assert variant in ("paper", "gpt2", "mistral")
    a, b = _float64(a, b)
    adam_a, adam_b = _Adam(a.shape, b1, b2, eps), _Adam(b.shape, b1, b2, eps)
    history = []
    for t in range(len(rates)):
        g = gradient(a, b, t)
        ga, gb = scale * b.T @ g, scale * g @ a.T
        ha = _inverse(b.T @ b, delta) @ ga
        if variant == "paper":
            hb = gb @ _inverse(a @ a.T, delta)
            a = adam_a.adamw(a, ha, rates[t], weight_decay)
            b = adam_b.adamw(b, hb, rates[t], weight_decay)
        else:
            correct_bias = variant == "gpt2"
            a = adam_a.hf_adam(a, ha, rates[t], weight_decay, correct_bias)
            hb = gb @ _inverse(a @ a.T, delta)  # the new A, after its step and its decay
            b = adam_b.hf_adam(b, hb, rates[t], weight_decay, correct_bias)
        history.append((a, b))
    return history


# Section 4, beta-hat: the bias correction folded into the decay, t from 1.
def _beta_hat(beta, t):
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


# Section 4, step 6: the growth of rho.
def _escape_mass(v_old, v_moved):
    eigenvalues = np.max(np.linalg.eigvalsh(v_old) - np.linalg.eigvalsh(v_moved))  # both ascending
    trace = np.trace(v_old) - np.trace(v_moved)
    return min(max(0.0, eigenvalues), max(0.0, trace))


# Section 4, step 7.
def _psi(v, rho, eps):
    w, u = np.linalg.eigh(v)
    return u @ np.diag(1 / (np.sqrt(np.maximum(w + rho, 0.0)) + eps)) @ u.T


# Section 4. `pairs` is [(a, b)], gradient(pairs, t) gives [G]; returns [[(a_t, b_t)] for each step]. clip is over all
# pairs; clip, skip and cap are off at 0.
def lora_rite(
    pairs,
    gradient,
    rates,
    scale=1.0,
    *,
    b1=0.9,
    b2=0.999,
    eps=1e-6,
    weight_decay=0.0,
    escape=True,
    second_moment="sum",
    clip=0.0,
    skip=0.0,
    cap=0.0,
):
    assert second_moment in ("sum", "mean")
    pairs = [tuple(_float64(a, b)) for a, b in pairs]
    states = []
    for a, b in pairs:
        r, n = a.shape
        m = b.shape[0]
        states.append(
            {
                "ma": np.zeros((n, r)),
                "mb": np.zeros((m, r)),
                "va": np.zeros((r, r)),
                "vb": np.zeros((r, r)),
                "qa": np.zeros((n, r)),
                "qb": np.zeros((m, r)),
                "rho_a": 0.0,
                "rho_b": 0.0,
            }
        )
    history = []
    for step in range(len(rates)):
        t = step + 1
        b1h, b2h = _beta_hat(b1, t), _beta_hat(b2, t)
        gs = gradient(pairs, step)
        work = []
        for (a, b), g in zip(pairs, gs, strict=True):
            ga, gb = scale * b.T @ g, scale * g @ a.T
            qa, ra = np.linalg.qr(a.T)  # 1
            qb, rb = np.linalg.qr(b)
            ra_inv, rb_inv = np.linalg.pinv(ra), np.linalg.pinv(rb)
            ua, ub = ga.T @ rb_inv, gb @ ra_inv  # 2
            if skip > 0:  # 3
                if _rms(ua) > skip:
                    ua = np.zeros_like(ua)
                if _rms(ub) > skip:
                    ub = np.zeros_like(ub)
            work.append([qa, qb, ra_inv, rb_inv, ua, ub])
        if clip > 0:  # 4
            norm = np.sqrt(sum(np.sum(ua**2) + np.sum(ub**2) for *_, ua, ub in work))
            if norm > clip:
                for w in work:
                    w[4], w[5] = w[4] * clip / norm, w[5] * clip / norm
        new_pairs = []
        for (a, b), state, (qa, qb, ra_inv, rb_inv, ua, ub) in zip(pairs, states, work, strict=True):
            sa, sb = ua.T @ ua, ub.T @ ub  # 5
            if second_moment == "mean":
                sa, sb = sa / ua.shape[0], sb / ub.shape[0]
            pa, pb = qb.T @ state["qb"], qa.T @ state["qa"]  # A's statistics live in B's basis and B's in A's
            va_moved, vb_moved = pa @ state["va"] @ pa.T, pb @ state["vb"] @ pb.T
            if escape:  # 6
                state["rho_a"] = b2h * (state["rho_a"] + _escape_mass(state["va"], va_moved))
                state["rho_b"] = b2h * (state["rho_b"] + _escape_mass(state["vb"], vb_moved))
            state["va"] = (1 - b2h) * sa + b2h * va_moved
            state["vb"] = (1 - b2h) * sb + b2h * vb_moved
            ua = ua @ _psi(state["va"], state["rho_a"], eps)  # 7
            ub = ub @ _psi(state["vb"], state["rho_b"], eps)
            state["ma"] = (1 - b1h) * ua + b1h * state["ma"] @ pa.T  # 8
            state["mb"] = (1 - b1h) * ub + b1h * state["mb"] @ pb.T
            step_a, step_b = state["ma"], state["mb"]  # 9
            if cap > 0:
                step_a = step_a / max(1.0, _rms(step_a) / cap)
                step_b = step_b / max(1.0, _rms(step_b) / cap)
            da, db = (step_a @ rb_inv.T).T, step_b @ ra_inv.T
            state["qa"], state["qb"] = qa, qb
            new_pairs.append(
                (a - rates[step] * (da + weight_decay * a), b - rates[step] * (db + weight_decay * b))
            )  # 10
        pairs = new_pairs
        history.append(pairs)
    return history


# Section 5: B^T B X + X A A^T = C, by the Kronecker product (row-major vec).
def _sylvester(btb, aat, c):
    r = c.shape[0]
    operator = np.kron(btb, np.eye(r)) + np.kron(np.eye(r), aat.T)
    return np.linalg.solve(operator, c.reshape(-1)).reshape(r, r)


# Section 5: hA and hB for the chosen X.
def _lora_pro_adjust(a, b, ga, gb, scale, projection, damping):
    btb, aat = b.T @ b, a @ a.T
    btb_inv, aat_inv = _inverse(btb, damping), _inverse(aat, damping)
    pb = b @ btb_inv @ b.T
    if projection == "zero":
        x = np.zeros_like(btb)
    elif projection == "symmetric":
        x = -0.5 * scale**-2 * btb_inv @ b.T @ gb @ aat_inv
    else:
        assert projection == "sylvester"
        right = -(scale**-2) * btb_inv @ ga @ a.T
        x = _sylvester(btb, aat, right) if np.any(right) else np.zeros_like(btb)
    ha = scale**-2 * btb_inv @ ga + x @ a
    hb = scale**-2 * (np.eye(b.shape[0]) - pb) @ gb @ aat_inv - b @ x
    return ha, hb


# Section 5. "efficient": AdamW in factor space; "full": full-size moments of g~, with the released code's k = t + 1 for
# variant="code" (variant does not matter to "efficient").
def lora_pro(
    a,
    b,
    gradient,
    rates,
    scale=1.0,
    *,
    form="efficient",
    projection="sylvester",
    damping=1e-8,
    weight_decay=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    variant="paper",
):
    assert form in ("efficient", "full") and variant in ("paper", "code")
    a, b = _float64(a, b)
    adam_a, adam_b = _Adam(a.shape, b1, b2, eps), _Adam(b.shape, b1, b2, eps)
    moment, second = np.zeros((b.shape[0], a.shape[1])), np.zeros((b.shape[0], a.shape[1]))
    history = []
    for t in range(len(rates)):
        g = gradient(a, b, t)
        ga, gb = scale * b.T @ g, scale * g @ a.T
        if form == "efficient":
            ha, hb = _lora_pro_adjust(a, b, ga, gb, scale, projection, damping)
            a = adam_a.adamw(a, ha, rates[t], weight_decay)
            b = adam_b.adamw(b, hb, rates[t], weight_decay)
        else:
            ha, hb = _lora_pro_adjust(a, b, ga, gb, scale, "zero", damping)
            equivalent = scale * b @ ha + scale * hb @ a
            moment = b1 * moment + (1 - b1) * equivalent
            second = b2 * second + (1 - b2) * equivalent**2
            k = (t + 1) + (1 if variant == "code" else 0)
            u = (moment / (1 - b1**k)) / (np.sqrt(second / (1 - b2**k)) + eps)
            ha, hb = _lora_pro_adjust(a, b, scale * b.T @ u, scale * u @ a.T, scale, projection, damping)
            a = a - rates[t] * weight_decay * a - rates[t] * ha
            b = b - rates[t] * weight_decay * b - rates[t] * hb
        history.append((a, b))
    return history


# Section 6, Algorithms 1 and 2: one factor a step, starting with `first`; no bias correction.
def _altlora_paper(a, b, gradient, rates, scale, plus, lam, weight_decay, b1, b2, eps, first):
    ma, mb, va, vb = np.zeros_like(a), np.zeros_like(b), np.zeros_like(a), np.zeros_like(b)
    b_prev, a_prev = b, a  # the other factor at this one's previous update
    history = []
    for t in range(len(rates)):
        g = gradient(a, b, t)
        ga, gb = scale * b.T @ g, scale * g @ a.T
        if (t % 2 == 0) == (first == "a"):
            inv = _inverse(b.T @ b, lam)
            h = scale**-2 * inv @ ga
            ma = b1 * (inv @ b.T @ b_prev @ ma) + (1 - b1) * h
            va = b2 * va + (1 - b2) * h**2
            step = ma / (np.sqrt(va) + eps) if plus else ma
            a = a - rates[t] * (step + weight_decay * a)
            b_prev = b
        else:
            inv = _inverse(a @ a.T, lam)
            h = scale**-2 * gb @ inv
            mb = b1 * (mb @ a_prev @ a.T @ inv) + (1 - b1) * h
            vb = b2 * vb + (1 - b2) * h**2
            step = mb / (np.sqrt(vb) + eps) if plus else mb
            b = b - rates[t] * (step + weight_decay * b)
            a_prev = a
        history.append((a, b))
    return history


# Section 6, the released code: A, then B with the new A's Gram and the stale gB, in every step; no s^-2; only the first
# moment is bias corrected; decay after the step; "plus" stores the moment that was not transported.
def _altlora_code(a, b, gradient, rates, scale, plus, lam, weight_decay, b1, b2, eps):
    ma, mb, va, vb = np.zeros_like(a), np.zeros_like(b), np.zeros_like(a), np.zeros_like(b)
    b_prev, a_prev = np.zeros_like(b), np.zeros_like(a)
    history = []
    for t in range(len(rates)):
        k = t + 1
        g = gradient(a, b, t)
        ga, gb = scale * b.T @ g, scale * g @ a.T

        inv = _inverse(b.T @ b, lam)
        h = inv @ ga
        used = b1 * (inv @ b.T @ b_prev @ ma) + (1 - b1) * h
        ma = b1 * ma + (1 - b1) * h if plus else used
        va = b2 * va + (1 - b2) * h**2
        step = used / (1 - b1**k)
        if plus:
            step = step / (np.sqrt(va) + eps)
        a = a - rates[t] * step
        a = a - rates[t] * weight_decay * a
        b_prev = b

        inv = _inverse(a @ a.T, lam)  # the new A
        h = gb @ inv
        used = b1 * (mb @ a_prev @ a.T @ inv) + (1 - b1) * h
        mb = b1 * mb + (1 - b1) * h if plus else used
        vb = b2 * vb + (1 - b2) * h**2
        step = used / (1 - b1**k)
        if plus:
            step = step / (np.sqrt(vb) + eps)
        b = b - rates[t] * step
        b = b - rates[t] * weight_decay * b
        a_prev = a

        history.append((a, b))
    return history


# Section 6. `first` is the paper variant's only.
def altlora(
    a,
    b,
    gradient,
    rates,
    scale=1.0,
    *,
    plus=False,
    lam=1e-6,
    weight_decay=0.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    first="a",
    variant="paper",
):
    assert first in ("a", "b") and variant in ("paper", "code")
    a, b = _float64(a, b)
    if variant == "paper":
        return _altlora_paper(a, b, gradient, rates, scale, plus, lam, weight_decay, b1, b2, eps, first)
    return _altlora_code(a, b, gradient, rates, scale, plus, lam, weight_decay, b1, b2, eps)


def msign(x):
    """U V^T of x, without missing directions."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > 1e-12 * s.max() if s.max() > 0 else s > 0
    return u[:, kept] @ vt[kept]


# LoRA-Muon, Algorithm 1 with the damping of Appendix B: both roots from the old factors, each sqrt(s) times as large.
def lora_muon(a, b, gradient, rates, scale=1.0, *, momentum=0.95, damping=1e-5, weight_decay=0.0):
    a, b = _float64(a, b)
    a, b = np.sqrt(scale) * a, np.sqrt(scale) * b
    ma, mb = np.zeros_like(a), np.zeros_like(b)

    def inverse_root(gram):
        values, vectors = np.linalg.eigh(gram)
        damped = values + damping * np.linalg.norm(gram)
        kept = damped > 1e-13 * damped.max()
        return (vectors[:, kept] / np.sqrt(damped[kept])) @ vectors[:, kept].T

    history = []
    for t in range(len(rates)):
        g = gradient(a / np.sqrt(scale), b / np.sqrt(scale), t)
        ma = momentum * ma + (1 - momentum) * b.T @ g
        mb = momentum * mb + (1 - momentum) * g @ a.T
        ra, rb = inverse_root(b.T @ b), inverse_root(a @ a.T)
        da, db = -rates[t] / 2 * ra @ msign(ra @ ma), -rates[t] / 2 * msign(mb @ rb) @ rb
        kept = np.sqrt(1 - rates[t] * weight_decay)
        a, b = kept * a + da / kept, kept * b + db / kept
        history.append((a / np.sqrt(scale), b / np.sqrt(scale)))
    return history


# LoFT, building blocks 1 to 5, for U = B, V = A^T and mirrored; moments in every step, B moves first.
def loft(a, b, gradient, rates, scale=1.0, *, b1=0.9, b2=0.999, eps=1e-4, lam=1e-6, weight_decay=0.0):
    a, b = _float64(a, b)
    factors = {"b": b, "a": a.T}  # tall: the rule is the same for both
    r = a.shape[0]
    m = {k: np.zeros_like(x) for k, x in factors.items()}
    p = {k: np.zeros((len(x), r, r)) for k, x in factors.items()}
    old, history = {k: np.zeros_like(x) for k, x in factors.items()}, []
    for t in range(len(rates)):
        g = gradient(factors["a"].T, factors["b"], t)
        inverse = {k: _inverse(factors[o].T @ factors[o], lam) for k, o in (("b", "a"), ("a", "b"))}
        for k, o, full in (("b", "a", g), ("a", "b", g.T)):
            h = full @ factors[o] @ inverse[k] / scale  # gB (A A^T)^-1 / s^2
            c = old[o].T @ factors[o] @ inverse[k]
            m[k] = b1 * m[k] @ c + (1 - b1) * h
            p[k] = b2 * c.T @ p[k] @ c + (1 - b2) * h[:, :, None] * h[:, None, :]
        old = dict(factors)
        k, o = ("b", "a") if t % 2 == 0 else ("a", "b")
        first = scale * m[k] @ old[o].T / (1 - b1 ** (t + 1))
        second = scale**2 * np.einsum("jr,irs,js->ij", old[o], p[k], old[o]) / (1 - b2 ** (t + 1))
        d = first / (np.sqrt(np.maximum(second, 0)) + eps)
        x = factors[k]
        factors[k] = x - rates[t] * weight_decay * x - rates[t] * d @ old[o] @ inverse[k] / scale
        history.append((factors["a"].T, factors["b"]))
    return history


# BaLoRA: AdamW, then the balanced factors of the product; signs nearest to the A before.
def balora(a, b, gradient, rates, scale=1.0, *, every=1, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    a, b = _float64(a, b)
    adam_a, adam_b = _Adam(a.shape, b1, b2, eps), _Adam(b.shape, b1, b2, eps)
    history = []
    for t in range(len(rates)):
        g = gradient(a, b, t)
        ga, gb = scale * b.T @ g, scale * g @ a.T
        a = adam_a.adamw(a, ga, rates[t], weight_decay)
        b = adam_b.adamw(b, gb, rates[t], weight_decay)
        if (t + 1) % every == 0 and np.linalg.matrix_rank(b @ a) == len(a):
            u, s, vt = np.linalg.svd(b @ a, full_matrices=False)
            root = np.sqrt(s[: len(a)])
            new_a, new_b = root[:, None] * vt[: len(a)], u[:, : len(a)] * root
            sign = np.where((new_a * a).sum(1) < 0, -1.0, 1.0)
            a, b = sign[:, None] * new_a, new_b * sign
        history.append((a, b))
    return history


# Section 7: c_i from row i of the current B, on gB before the moments or on B's Adam step.
def allora(a, b, gradient, rates, scale=1.0, *, eta=2.0, on="gradient", weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    assert on in ("gradient", "update")
    a, b = _float64(a, b)
    adam_a, adam_b = _Adam(a.shape, b1, b2, eps), _Adam(b.shape, b1, b2, eps)
    history = []
    for t in range(len(rates)):
        g = gradient(a, b, t)
        ga, gb = scale * b.T @ g, scale * g @ a.T
        c = np.array([1 / np.sqrt(np.linalg.norm(row) + 1 / eta**2) for row in b])[:, None]
        a = adam_a.adamw(a, ga, rates[t], weight_decay)
        if on == "gradient":
            b = adam_b.adamw(b, c * gb, rates[t], weight_decay)
        else:
            u = adam_b.direction(gb)
            b = b - rates[t] * weight_decay * b - rates[t] * c * u
        history.append((a, b))
    return history


# Section 8, alternating least squares from (a, b); lam weighs the distance to the old factor, and directions that the
# other factor lacks stay.
def _als(target, a, b, rounds, lam, ridge=False):
    for _ in range(rounds if ridge else 0):
        b = target @ a.T @ _inverse(a @ a.T, lam)
        a = _inverse(b.T @ b, lam) @ b.T @ target
    for _ in range(0 if ridge else rounds):
        b = b + (target - b @ a) @ a.T @ _inverse(a @ a.T, lam)
        a = a + _inverse(b.T @ b, lam) @ b.T @ (target - b @ a)
    return b, a


# Section 8.
def oplora(
    a,
    b,
    gradient,
    rates,
    scale=1.0,
    *,
    rounds=1,
    lam=0.0,
    momentum=None,
    gradient_form="tangent",
    weight_decay=0.0,
    ridge=False,
):
    assert gradient_form in ("tangent", "full")
    a, b = _float64(a, b)
    mb, ma = np.zeros_like(b), np.zeros_like(a)
    history = []
    for t in range(len(rates)):
        g = gradient(a, b, t)
        if gradient_form == "tangent":
            pb, pa = b @ np.linalg.pinv(b), np.linalg.pinv(a) @ a
            g = g - (np.eye(b.shape[0]) - pb) @ g @ (np.eye(a.shape[1]) - pa)
        d = g
        if momentum is not None:
            mb, ma = _als(momentum * mb @ ma + (1 - momentum) * g, a, b, rounds, 0)
            d = mb @ ma
        new_b, new_a = _als(b @ a - rates[t] / scale * d, a, b, rounds, lam, ridge)
        a, b = new_a - rates[t] * weight_decay * a, new_b - rates[t] * weight_decay * b
        history.append((a, b))
    return history


# Section 9, steps 1 and 2: one Newton step of rate `rate` on both factors of a moment, both from the old ones.
def _newton(tall, wide, g, rate):
    new_tall = (1 - rate) * tall + rate * g @ wide.T @ np.linalg.pinv(wide @ wide.T)
    new_wide = (1 - rate) * wide + rate * np.linalg.pinv(tall.T @ tall) @ tall.T @ g
    return new_tall, new_wide


# Section 9, on gA^T and on gB; mb0[name] = {"m": (p, rank), "v": (p, rank)} starts the tall factors, name in "a", "b".
def lora_pre(a, b, gradient, rates, scale=1.0, *, rank, mb0, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    a, b = _float64(a, b)
    r = a.shape[0]
    rate_m, rate_v = 1 - np.sqrt(b1), 1 - b2**0.25
    states = {}
    for name in ("a", "b"):
        m_tall, v_tall = _float64(mb0[name]["m"], mb0[name]["v"])
        states[name] = [m_tall, np.zeros((rank, r)), v_tall, np.zeros((rank, r))]
    history = []
    for step in range(len(rates)):
        t = step + 1
        full = gradient(a, b, step)
        tall_gradients = {"a": (scale * b.T @ full).T, "b": scale * full @ a.T}
        u = {}
        for name, g in tall_gradients.items():
            m_tall, m_wide, v_tall, v_wide = states[name]
            m_tall, m_wide = _newton(m_tall, m_wide, g, rate_m)
            v_tall, v_wide = _newton(v_tall, v_wide, np.abs(g), rate_v)
            states[name] = [m_tall, m_wide, v_tall, v_wide]
            m = b1 * m_tall @ m_wide + (1 - b1) * g  # 3, with the new factors
            v = b2 * (v_tall @ v_wide) ** 2 + (1 - b2) * g**2
            u[name] = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)  # 4
        a = a - rates[step] * (u["a"].T + weight_decay * a)
        b = b - rates[step] * (u["b"] + weight_decay * b)
        history.append((a, b))
    return history


# Section 10: the Q of the QR decomposition with a positive diagonal of R.
def _qf(x):
    q, r = np.linalg.qr(x)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


# Section 10. The first step only sets B = q0 and A = 0; B never decays.
def stiefel_lora(
    a, b, gradient, rates, scale=1.0, *, q0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, stiefel_rate=0.1
):
    a, b, q0 = _float64(a, b, q0)
    adam_a = _Adam(a.shape, b1, b2, eps)
    moment = np.zeros_like(b)
    history = []
    for t in range(len(rates)):
        if t == 0:
            a, b = np.zeros_like(a), q0
            history.append((a, b))
            continue
        k = t  # the moments' own count
        g = gradient(a, b, t)
        ga, gb = scale * b.T @ g, scale * g @ a.T
        a = adam_a.adamw(a, ga, rates[t], weight_decay)
        moment = b1 * moment + (1 - b1) * gb
        corrected = moment / (1 - b1**k)
        btm = b.T @ corrected
        xi = corrected - b @ ((btm + btm.T) / 2)
        b = _qf(b - stiefel_rate * xi)
        history.append((a, b))
    return history


# Section 13: A stays. "paper" is AdamW on B; "peft" is HFAdam on hB.
def lora_fa(a, b, gradient, rates, scale=1.0, *, variant="paper", weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    assert variant in ("paper", "peft")
    a, b = _float64(a, b)
    adam_b = _Adam(b.shape, b1, b2, eps)
    history = []
    for t in range(len(rates)):
        gb = scale * gradient(a, b, t) @ a.T
        if variant == "paper":
            b = adam_b.adamw(b, gb, rates[t], weight_decay)
        else:
            hb = scale**-2 * gb @ _inverse(a @ a.T, 1e-8)
            b = adam_b.hf_adam(b, hb, rates[t], weight_decay)
        history.append((a, b))
    return history
