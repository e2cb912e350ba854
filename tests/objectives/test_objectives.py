"""Objectives against float64 transcriptions of their papers, finite differences, and TRL."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, objectives
from stablelora_jax.objectives import dpo, kto, kto_reference_point, masked_target_kl, orpo, sft, simpo

B = 5
RNG = np.random.default_rng(0)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = -RNG.uniform(1, 30, (4, B))
CHOSEN_LENGTH, REJECTED_LENGTH = RNG.integers(2, 12, (2, B))
DESIRABLE = np.array([True, False, True, True, False])


def sigma(x):
    return 1 / (1 + np.exp(-x))


def h():
    return (CHOSEN - REJECTED) - (REF_CHOSEN - REF_REJECTED)


def odds(log_p, length):
    p = np.exp(log_p / length)
    return p / (1 - p)


def orpo_oracle():
    ratio = odds(CHOSEN, CHOSEN_LENGTH) / odds(REJECTED, REJECTED_LENGTH)
    return -CHOSEN / CHOSEN_LENGTH - 0.3 * np.log(sigma(np.log(ratio)))


def kto_oracle():
    r, z0 = CHOSEN - REF_CHOSEN, 1.7
    value = np.where(DESIRABLE, sigma(0.2 * (r - z0)), sigma(0.2 * (z0 - r)))
    weight = np.where(DESIRABLE, 1.3, 0.6)
    return weight - weight * value


PAIRS, REFERENCE = (CHOSEN, REJECTED), (REF_CHOSEN, REF_REJECTED)
LENGTHS = (CHOSEN_LENGTH, REJECTED_LENGTH)
# name: the function of its differentiated arguments, these, and the transcription's values
CASES = {
    "sft": (sft, (CHOSEN,), lambda: -CHOSEN),
    "dpo": (lambda *p: dpo(*p, *REFERENCE, beta=0.3), PAIRS, lambda: -np.log(sigma(0.3 * h()))),
    "dpo_smoothed": (
        lambda *p: dpo(*p, *REFERENCE, beta=0.3, label_smoothing=0.2),
        PAIRS,
        lambda: -0.8 * np.log(sigma(0.3 * h())) - 0.2 * np.log(sigma(-0.3 * h())),
    ),
    "dpo_ipo": (
        lambda *p: dpo(*p, *REFERENCE, beta=0.3, loss_type="ipo"),
        PAIRS,
        lambda: (h() - 1 / 0.6) ** 2,
    ),
    "dpo_hinge": (
        lambda *p: dpo(*p, *REFERENCE, beta=0.3, loss_type="hinge"),
        PAIRS,
        lambda: np.maximum(0, 1 - 0.3 * h()),
    ),
    "orpo": (lambda *p: orpo(*p, *LENGTHS, weight=0.3), PAIRS, orpo_oracle),
    "simpo": (
        lambda *p: simpo(*p, *LENGTHS, beta=2.5, gamma=0.7),
        PAIRS,
        lambda: -np.log(sigma(2.5 * (CHOSEN / CHOSEN_LENGTH - REJECTED / REJECTED_LENGTH) - 0.7)),
    ),
    "kto": (
        lambda c: kto(c, REF_CHOSEN, DESIRABLE, 1.7, beta=0.2, lambda_d=1.3, lambda_u=0.6),
        (CHOSEN,),
        kto_oracle,
    ),
}


def test_every_member_is_in_the_table():
    named = {name.split("_")[0] for name in CASES} | {"kto_reference_point", "masked_target_kl"}
    assert named == set(objectives.__all__)


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_papers_and_gradients_are_finite_differences(name, x64):
    function, given, oracle = CASES[name]
    np.testing.assert_allclose(function(*given), oracle(), rtol=1e-10, atol=1e-10)
    total = lambda *given: function(*given).sum()
    gradients = jax.grad(total, tuple(range(len(given))))(*map(jnp.asarray, given))
    for number, gradient in enumerate(gradients):
        for i in range(B):
            moved = [np.array(x) for x in given]
            moved[number][i] += 1e-6
            above = total(*moved)
            moved[number][i] -= 2e-6
            np.testing.assert_allclose(gradient[i], (above - total(*moved)) / 2e-6, rtol=1e-6, atol=1e-8)


def test_dpo_of_the_reference_itself_is_log_2():
    np.testing.assert_allclose(dpo(CHOSEN, REJECTED, CHOSEN, REJECTED), np.log(2), rtol=1e-6)


def test_extreme_pairs_stay_finite():
    large = jnp.array([-1e4, -1e-7, 0.0])
    for function in (
        lambda a, b: dpo(a, b, b, a),
        lambda a, b: simpo(a, b, jnp.ones(3), jnp.ones(3)),
        lambda a, b: orpo(a, b, jnp.ones(3), jnp.ones(3)),
        lambda a, b: kto(a, b, jnp.array([True, False, True]), 0.0),
    ):
        value, gradient = jax.value_and_grad(lambda a, f=function: f(a, large[::-1]).sum())(large)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_reference_point_is_a_mean_that_is_not_below_0_and_a_constant(x64):
    np.testing.assert_allclose(kto_reference_point(REF_CHOSEN, CHOSEN), max(0, (REF_CHOSEN - CHOSEN).mean()))
    assert kto_reference_point(CHOSEN - 50, CHOSEN) == 0
    assert not jax.grad(kto_reference_point)(jnp.asarray(REF_CHOSEN), CHOSEN).any()
    moved = jax.grad(lambda z0: kto(CHOSEN, REF_CHOSEN, DESIRABLE, z0).sum())(1.0)
    assert moved == 0


class TestMaskedTargetKL:
    V = 7

    def case(self):
        rng = np.random.default_rng(1)
        return rng.normal(size=(3, self.V)), rng.normal(size=(3, self.V)), np.array([0, 4, 6])

    def oracle(self, q, p, targets, weight):
        losses = []
        for q_row, p_row, t in zip(q, p, targets, strict=True):
            q_probs, p_probs = (np.exp(z) / np.exp(z).sum() for z in (q_row, p_row))
            rest = np.arange(self.V) != t
            q_rest, p_rest = (x[rest] / (1 - x[t]) for x in (q_probs, p_probs))
            losses.append(-np.log(q_probs[t]) + weight * (p_rest * np.log(p_rest / q_rest)).sum())
        return np.array(losses)

    def test_is_the_papers(self, x64):
        q, p, targets = self.case()
        np.testing.assert_allclose(masked_target_kl(q, p, targets, weight=0.7), self.oracle(q, p, targets, 0.7), 1e-10)

    def test_of_the_base_itself_is_the_cross_entropy(self, x64):
        q, _, targets = self.case()
        np.testing.assert_allclose(
            masked_target_kl(q, q, targets), self.oracle(q, q, targets, 0), rtol=1e-10, atol=1e-12
        )

    def test_leaves_the_target_to_the_cross_entropy(self, x64):
        q, p, targets = self.case()
        gradient = jax.grad(lambda q, weight: masked_target_kl(q, p, targets, weight=weight).sum())
        divergence = gradient(jnp.asarray(q), 2.0) - gradient(jnp.asarray(q), 1.0)
        np.testing.assert_allclose(divergence[np.arange(3), targets], 0, atol=1e-12)
        np.testing.assert_allclose(divergence.sum(axis=1), 0, atol=1e-12)
        assert np.abs(divergence).max() > 1e-2

    def test_a_certain_target_gives_no_nan(self):
        logits = jnp.array([[200.0, 0.0, -3.0]])
        value, gradient = jax.value_and_grad(lambda q: masked_target_kl(q, logits, jnp.array([0])).sum())(logits)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "wrong,message",
    [
        (lambda: dpo(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED[:2]), "ref_rejected"),
        (lambda: dpo(*PAIRS, *REFERENCE, beta=0.0), "beta must be above 0"),
        (lambda: dpo(*PAIRS, *REFERENCE, label_smoothing=0.5), "label_smoothing must be a number in"),
        (lambda: dpo(*PAIRS, *REFERENCE, loss_type="sigmoidal"), "one of sigmoid, ipo, hinge"),
        (lambda: dpo(*PAIRS, *REFERENCE, loss_type="ipo", label_smoothing=0.1), "belongs to loss_type 'sigmoid'"),
        (lambda: simpo(*PAIRS, CHOSEN_LENGTH[:1], REJECTED_LENGTH), "one shape"),
        (lambda: orpo(*PAIRS, *LENGTHS, weight=-1.0), "weight must be a number in"),
        (lambda: kto(CHOSEN, REF_CHOSEN, DESIRABLE, 0.0, beta=-1.0), "beta must be"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()


@pytest.fixture
def torch(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    found = pytest.importorskip("torch")
    pytest.importorskip("trl")
    return found


def tensors(torch, *arrays):
    return [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in arrays]


def fake_trainer(torch, **own):
    """What the loss of a trainer of TRL reads of its trainer."""
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    fixed = {"aux_loss_enabled": False, "precompute_ref_logps": True, "_total_train_tokens": 0, "_tp_size": 1}
    model = SimpleNamespace(training=True)
    return SimpleNamespace(accelerator=same, model=model, _metrics=defaultdict(Metrics), **fixed, **own)


class Metrics(defaultdict):
    def __init__(self):
        super().__init__(list)


def outputs(torch, log_probs):
    """Of a model whose completions are one token long."""
    zeros = torch.zeros_like(log_probs)
    others = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), "aux_loss": None}
    return SimpleNamespace(log_probs=log_probs, **others)


def rows(torch, count):
    ids = torch.zeros((count, 2), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": torch.tensor([[0, 1]] * count)}


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_dpo_is_trls(loss_type, torch):
    from trl import DPOTrainer

    given = tensors(torch, *PAIRS)
    own = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "beta": 0.3, "label_smoothing": 0.0}
    own |= {"use_weighting": False, "loss_types": [loss_type], "loss_weights": [1.0]}
    references = zip(("ref_chosen_logps", "ref_rejected_logps"), tensors(torch, *REFERENCE), strict=True)
    model = lambda **_: outputs(torch, torch.cat(given)[:, None])
    batch = {**rows(torch, 2 * B), **dict(references)}
    theirs = DPOTrainer._compute_loss(fake_trainer(torch, **own), with_training(model), batch, False)
    compare(lambda *given: dpo(*given, *REFERENCE, beta=0.3, loss_type=loss_type).mean(), given, theirs)


def test_kto_is_trls(torch):
    from trl import KTOTrainer

    given = tensors(torch, CHOSEN)
    mismatched, ref_mismatched = torch.full((B,), -3.0), torch.full((B,), -4.7)
    own = {"loss_type": "kto", "beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.6, "calculate_KL": True}
    own["_compute_kl_logps"] = lambda model, batch: mismatched
    batch = {**rows(torch, B), "label": torch.tensor(DESIRABLE), "ref_KL_logps": ref_mismatched}
    batch["ref_logps"] = torch.tensor(REF_CHOSEN, dtype=torch.float32)
    model = lambda **_: outputs(torch, given[0][:, None])
    theirs = KTOTrainer._compute_loss(fake_trainer(torch, **own), with_training(model), batch, False)
    z0 = kto_reference_point(mismatched.numpy(), ref_mismatched.numpy())
    function = lambda c: kto(c, REF_CHOSEN, DESIRABLE, z0, beta=0.2, lambda_d=1.3, lambda_u=0.6).mean()
    compare(function, given, theirs)


def with_training(model):
    model.training = True
    return model


def test_orpo_is_trls(torch):
    from trl.experimental.orpo import ORPOTrainer

    given = tensors(torch, *(x / n for x, n in zip(PAIRS, LENGTHS, strict=True)))
    fake = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = -given[0] - ORPOTrainer.odds_ratio_loss(fake, *given)[0]  # their likelihood is a mean over all tokens
    compare(lambda *means: orpo(*means, np.ones(B), np.ones(B), weight=0.3), given, theirs)


def test_simpo_is_trls(torch):
    from trl.experimental.cpo import CPOTrainer

    given = tensors(torch, *(x / n for x, n in zip(PAIRS, LENGTHS, strict=True)))
    fake = SimpleNamespace(beta=2.5, alpha=0.0, simpo_gamma=0.7, label_smoothing=0.0, loss_type="simpo")
    fake.accelerator = SimpleNamespace(device="cpu")
    theirs = CPOTrainer.cpo_loss(fake, *given)[0]
    compare(lambda *means: simpo(*means, np.ones(B), np.ones(B), beta=2.5, gamma=0.7), given, theirs)


def compare(function, given, theirs):
    """Values, and the gradients of their sum."""
    theirs.sum().backward()
    arrays = [jnp.asarray(x.detach().numpy()) for x in given]
    np.testing.assert_allclose(function(*arrays), theirs.detach().numpy(), rtol=1e-5)
    found = jax.grad(lambda *given: function(*given).sum(), tuple(range(len(arrays))))(*arrays)
    for ours, tensor in zip(found, given, strict=True):
        np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=1e-5, atol=1e-7)
