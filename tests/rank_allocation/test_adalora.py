"""AdaLoRA: its budget, its masks and its importances, against PEFT's own allocator; its penalty, against NumPy."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, LoraSpec, init_adapters
from stablelora_jax.lora.zero_ranks import without_zero_ranks
from stablelora_jax.rank_allocation import RANK_ALLOCATIONS
from stablelora_jax.rank_allocation.adalora import mask_to_budget, orthogonality
from stablelora_jax.rank_allocation.budget import budget_schedule, largest
from stablelora_jax.utils import tree
from tests.helpers import jit
from tests.rank_allocation.cases import R, base, changes, moved

SPEC = LoraSpec(target_modules=["proj", "head"], rank=R, parametrization="adalora", init="init_ab")
PARTIAL = replace(SPEC, target_modules=["proj"], layers_to_transform=(0, 2))
ALONE = ("net", "head")
STACK = ("net", "layers", "proj")


def allocator(steps, target_rank, tinit, tfinal, delta_t, modules, rank=R):
    """PEFT's, for a model of the parameters that it looks for."""
    torch = pytest.importorskip("torch")
    layer = pytest.importorskip("peft.tuners.adalora.layer")
    names = {"target_r": target_rank, "tinit": tinit, "tfinal": tfinal, "deltaT": delta_t, "total_step": steps}
    model = torch.nn.Module()
    for name, (rows, columns) in modules.items():
        shapes = {"lora_A": (rank, rows), "lora_E": (rank, 1), "lora_B": (columns, rank)}
        for letter, shape in shapes.items():
            model.register_parameter(f"{name}_{letter}", None)
            model._parameters[f"{name}.{letter}.default"] = torch.nn.Parameter(torch.zeros(shape))
            del model._parameters[f"{name}_{letter}"]
    config = SimpleNamespace(beta1=0.85, beta2=0.85, **names)
    return layer.RankAllocator(model, config, "default"), model


@pytest.mark.parametrize("steps,target,tinit,tfinal", [(40, 2, 0, 0), (37, 1, 5, 9), (1000, 3, 100, 300)])
def test_the_budget_is_pefts_and_falls_from_the_first_to_the_last(steps, target, tinit, tfinal):
    sizes = {str(i): (3, 2) for i in range(21)}
    theirs, _ = allocator(steps, target, tinit, tfinal, 1, sizes, rank=12)
    schedule = budget_schedule(12 * 21, target * 21, steps, tinit, tfinal)
    found = np.asarray(jax.vmap(schedule)(jnp.arange(steps + 1)))
    assert found.dtype == np.int32 and found.tolist() == [theirs.budget_schedule(t)[0] for t in range(steps + 1)]
    assert found[0] == found[tinit] == 12 * 21 and (found[steps - tfinal :] == target * 21).all()
    assert (np.diff(found) <= 0).all()


def flat(adapters):
    """PEFT's names and shapes: of a stack, each layer."""
    found = {}
    for path in (STACK, ALONE):
        node = {name: np.asarray(leaf) for name, leaf in tree.get_in(adapters, path).items()}
        for i in range(3) if path == STACK else [...]:
            name = f"proj{i}" if path == STACK else "head"
            found[f"{name}.lora_A.default"] = node["lora_a"][i].T
            found[f"{name}.lora_B.default"] = node["lora_b"][i].T
            found[f"{name}.lora_E.default"] = node["lora_e"][i][:, None]
    return found


def test_masks_and_importances_are_pefts():
    """Over all phases; both see the same numbers and the same gradients."""
    steps, sizes = 14, {**{f"proj{i}": (6, 5) for i in range(3)}, "head": (5, 7)}
    theirs, model = allocator(steps, 1, 2, 4, 3, sizes)
    torch, own = pytest.importorskip("torch"), dict(model.named_parameters())
    tx = mask_to_budget(optax.sgd(0.05), SPEC, steps, 1, tinit=2, tfinal=4, delta_t=3)
    adapters = moved(SPEC)
    state, update = tx.init(adapters), jit(tx.update)
    rng, frozen, masked = np.random.default_rng(1), None, []
    for t in range(1, steps + 1):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), adapters)
        for name, value in flat(jax.tree.map(lambda w, g: w - 0.05 * g, adapters, grads)).items():
            own[name].data = torch.tensor(value.copy())
        for name, value in flat(grads).items():
            own[name].grad = torch.tensor(value.copy())
        updates, state = update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        if t <= steps - 4:  # as AdaLoraModel.update_and_allocate
            _, found = theirs.update_and_allocate(model, t, force_mask=t == steps - 4)
            frozen = found or frozen
        else:
            theirs.mask_using_rank_pattern(model, frozen)
        for name, value in flat(adapters).items():
            np.testing.assert_allclose(value, own[name].detach(), rtol=1e-5, atol=1e-6, err_msg=f"{t} {name}")
        masked.append(sum((value == 0).sum() for name, value in flat(adapters).items() if "lora_E" in name))
    for ours, known in ((state.sensitivity, theirs.exp_avg_ipt), (state.uncertainty, theirs.exp_avg_unc)):
        for name, value in flat(ours).items():
            np.testing.assert_allclose(value, known[name], rtol=1e-4, atol=1e-7, err_msg=name)
    budget = budget_schedule(16, 4, steps, 2, 4)
    due = [t > 2 and (t % 3 == 0 or t >= 10) for t in range(1, steps + 1)]
    assert masked == [16 - int(budget(t)) if one else 0 for t, one in enumerate(due, 1)]


def test_of_equal_scores_the_first_are_kept_and_padding_never():
    scores = {("a",): jnp.array([[1.0, 2.0], [1.0, 1.0]]), ("b",): jnp.array([1.0, 3.0])}
    used = {("a",): np.array([[True, True], [False, False]]), ("b",): np.array([True, True])}
    for count, expected in ((0, "000000"), (2, "010001"), (3, "110001"), (4, "110011"), (9, "110011")):
        kept = largest(scores, used, jnp.int32(count))
        assert "".join(str(int(x)) for own in kept.values() for x in own.ravel()) == expected


def test_layers_that_are_not_adapted_have_no_share():
    """After the last step, as many e are not zero as the budget says; they are what is left after ``finished``."""
    adapters, steps = init_adapters(jax.random.key(0), base(), PARTIAL), 5
    own = RANK_ALLOCATIONS["adalora"](PARTIAL, steps, target_rank=1)
    tx = own.around(optax.adam(0.1))
    state, update = tx.init(adapters), jit(tx.update)
    for t in range(steps):
        grads = jax.tree.map(lambda x, t=t: jnp.sin(jnp.arange(x.size, dtype=x.dtype) + t).reshape(x.shape), adapters)
        node = tree.get_in(adapters, STACK)
        padding = jax.tree.map(lambda x: (jnp.arange(3) == 1).reshape(3, *(1,) * (x.ndim - 1)), node)
        grads = jax.tree.map(lambda g, p: jnp.where(p, 0, g), grads, tree.set_in({}, STACK, padding))
        updates, state = update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    e = np.asarray(tree.get_in(adapters, STACK)["lora_e"])
    assert (e != 0).sum() == 2 and not e[1].any()
    small, spec = own.finished(adapters, PARTIAL)
    assert tree.get_in(small, STACK)["lora_a"].shape[-1] == max((e != 0).sum(1))
    before, after = changes(adapters, PARTIAL), changes(small, spec)
    for name in before:
        np.testing.assert_allclose(after[name], before[name], atol=1e-6)
    assert [spec.rank_of(f"net.layers.{i}.proj") for i in (0, 2)] == np.maximum((e != 0).sum(1), 1)[[0, 2]].tolist()


def test_the_penalty_is_the_papers_and_zero_iff_orthonormal():
    adapters = moved(SPEC)
    both = jit(jax.value_and_grad(lambda x: orthogonality(x, SPEC)))
    found, grads = both(adapters)
    norms = []
    for name, value in flat(adapters).items():
        factor = value.astype(np.float64) if "lora_A" in name else value.T.astype(np.float64)
        if "lora_E" not in name:
            norms.append(np.linalg.norm(factor @ factor.T - np.eye(R)))
    np.testing.assert_allclose(found, np.mean(norms), rtol=1e-5)
    a = np.asarray(tree.get_in(adapters, ALONE)["lora_a"], np.float64)  # d ||A^T A - I|| / dA, of 8 factors
    gram = a.T @ a - np.eye(R)
    expected = 2 * a @ gram / np.linalg.norm(gram) / 8
    np.testing.assert_allclose(tree.get_in(grads, ALONE)["lora_a"], expected, rtol=1e-4, atol=1e-6)
    eye = jax.tree.map(lambda x: jnp.broadcast_to(jnp.eye(*x.shape[-2:]), x.shape) if x.ndim > 1 else x, adapters)
    node = {k: tree.get_in(eye, STACK)[k] for k in ("lora_a", "lora_b")}
    eye = tree.set_in(eye, STACK, {**node, "lora_e": tree.get_in(adapters, STACK)["lora_e"]})
    value, grads = both(eye)
    assert value == 0 and not any(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))
    padded = init_adapters(jax.random.key(0), base(), PARTIAL)
    pair = tree.get_in(padded, STACK)
    factors = [pair["lora_a"][i].T for i in (0, 2)] + [pair["lora_b"][i] for i in (0, 2)]
    expected = np.mean([np.linalg.norm(np.asarray(f @ f.T) - np.eye(R)) for f in factors])
    np.testing.assert_allclose(orthogonality(padded, PARTIAL), expected, rtol=1e-5)


def test_bad_numbers_are_refused():
    for options, words in (
        ({"target_rank": 4}, r"target_rank 4 must be in \[1, 4\), below the rank of the spec"),
        ({"target_rank": 0}, "target_rank 0 must be"),
        ({"tinit": 5, "tfinal": 5}, "tinit 5 and tfinal 5 leave none of the 10 steps"),
        ({"tinit": -1}, "tinit -1 and tfinal 0 leave none"),
        ({"delta_t": 0}, "delta_t must be at least 1"),
        ({"beta1": 1.0}, r"beta1 and beta2 in \(0, 1\)"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight must not be negative"),
    ):
        with pytest.raises(InputError, match=words):
            RANK_ALLOCATIONS["adalora"](SPEC, 10, **{"target_rank": 2, **options})
    with pytest.raises(
        InputError, match="adalora masks the singular values e of A diag.e. B: it is for parametrization"
    ):
        RANK_ALLOCATIONS["adalora"](LoraSpec(), 10)
    assert RANK_ALLOCATIONS["adalora"](SPEC, 10, target_rank=2, orth_reg_weight=0.0).penalty is None
    assert RANK_ALLOCATIONS["adalora"](SPEC, 10, target_rank=2).finished is without_zero_ranks
