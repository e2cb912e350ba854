"""What the backward pass keeps and what it computes anew: the same gradients, in steps of work and memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, freeze_a, init_adapters
from stablelora_jax.data import Batch
from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.models.remat import KEPT
from stablelora_jax.training.flops import dots
from stablelora_jax.training.loss import summed_loss
from stablelora_jax.training.remat_policy import saved_activation_bytes
from tests.helpers import TINY, jit, largest_difference, long, random_params, tokens, trained

B, T, L, R = 3, 37, 5, 2  # no other size of the model but the rank
POLICIES = ("everything", "save_dots", "no_mlp", "attention", "nothing")


def problem(policy, dtype=jnp.float32, attention="xla", dropout=0.0, **changes):
    """``(model, spec, loss of adapters and params)``."""
    spec = LoraSpec(target_modules="all-linear", rank=R, dropout=dropout)
    config = DecoderConfig(**{**TINY, "num_hidden_layers": L, "vocab_size": 61, **changes})
    model = Decoder(config, dtype=dtype, remat=policy, attention=attention)
    ones = np.ones((B, T), np.int32)
    batch = Batch(np.asarray(tokens(B, T, 61)), ones, ones, ones * np.arange(T, dtype=np.int32))

    def loss(adapters, params):
        keys = jax.random.split(jax.random.key(1), B) if dropout else None
        return summed_loss(adapted(model, spec), {"params": params, "lora": adapters}, batch, keys)

    return model, spec, loss


def abstract(policy, part=lambda adapters: adapters, **changes):
    """``(config, loss, shapes of adapters, shapes of params)``: nothing is allocated or compiled."""
    model, spec, whole = problem(policy, **changes)
    loss = lambda adapters, params: whole(part(adapters), params)
    params = abstract_params(model)
    adapters = jax.eval_shape(partial(init_adapters, spec=spec), jax.eval_shape(lambda: jax.random.key(0)), params)
    return model.config, loss, adapters, params


@pytest.mark.parametrize(
    "policies,changes",
    [
        long(POLICIES, {"dropout": 0.3, "tie_word_embeddings": True}),
        (("everything", "save_dots", "attention"), {"qk_norm": True, "attention": "blockwise"}),
    ],
    ids=["dropout_tied", "norms_blocks"],
)
def test_every_policy_is_the_same_function(policies, changes):
    model, spec, _ = problem("everything", num_hidden_layers=2, **changes)
    params = random_params(model, tokens())
    adapters, found = trained(init_adapters(jax.random.key(0), params, spec), spec), {}
    for policy in policies:
        loss = problem(policy, num_hidden_layers=2, **changes)[2]
        found[policy] = jit(jax.value_and_grad(loss))(adapters, params)
    value, gradient = found["everything"]
    assert min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3
    for policy in policies[1:]:
        np.testing.assert_allclose(found[policy][0], value, rtol=1e-6, err_msg=policy)
        assert largest_difference(found[policy][1], gradient) < 1e-6, policy


def work(policy, **changes):
    """FLOPs of the products of a gradient."""
    _, loss, adapters, params = abstract(policy, **changes)
    return dots(jax.make_jaxpr(jax.grad(loss))(adapters, params))


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
def test_policies_are_steps_of_work(attention):
    """Useful multiplies nothing twice; each of the others does what its place in the table says."""
    none, save_dots, no_mlp, some, all_of_it = (work(policy, attention=attention) for policy in POLICIES)
    assert none == save_dots
    D, F, hd, each = 16, 24, 4, 2 * B * T * L
    mlp = each * (2 * D * F + 2 * R * F)  # gate and up, and the second product of their pairs
    assert no_mlp - save_dots == mlp
    projections = each * ((4 + 2 * 2) * hd * (D + R) + 4 * hd * D + R * D)  # q, k, v and o
    assert some - no_mlp - projections == (each * T * 4 * hd if attention == "xla" else 0)  # scores
    assert all_of_it > some


def kept(policy, **changes):
    """Bytes that the layers keep for the backward pass."""
    _, loss, adapters, params = abstract(policy, **changes)
    residuals = jax.eval_shape(lambda a, p: jax.vjp(lambda a: loss(a, p), a)[1], adapters, params)
    stacked = [leaf for leaf in jax.tree.leaves(residuals) if leaf.shape[:1] == (L,) and B in leaf.shape]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in stacked)


def said(policy, **changes):
    """The same by ``memory.py``, with the ranks of seven pairs."""
    dtype, dense = changes.get("dtype", jnp.float32), changes.get("attention", "xla") == "xla"
    how = {"rows": B, "length": T, "dtype": dtype, "ranks": 7 * R, "dense": dense}
    return saved_activation_bytes(abstract(policy, **changes)[0], policy, **how)


HALF = {"attention": "blockwise", "dtype": jnp.bfloat16}
MEMORY = {
    "float32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "blockwise": {"attention": "blockwise"},
    "bfloat16_blocks": HALF,
    "dropout": {"dropout": 0.1, **HALF},
}


@pytest.mark.parametrize("case", ["dropout", *(long(case) for case in MEMORY if case != "dropout")])
def test_memory_says_what_is_kept(case):
    """Exactly, but for the filling of attention's last tile and dropout's keys."""
    sizes = [kept(policy, **MEMORY[case]) for policy in POLICIES[1:]]
    expected = [said(policy, **MEMORY[case]) for policy in POLICIES[1:]]
    assert sizes == expected if case in ("float32", "bfloat16") else sizes == pytest.approx(expected, rel=0.05)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_all_that_autodiff_asks_for_is_more_than_twice_as_much():
    assert kept("everything", **HALF) > 2 * kept("save_dots", **HALF)


@pytest.mark.parametrize("policy", ["everything", "save_dots"])
def test_a_constant_a_costs_neither_products_nor_memory(policy):
    """LoRA-FA: no gradient of A is multiplied, and what it alone would need is not kept."""
    inputs = 3 * 16 + 16 + 2 * 16 + 24  # q, k, v; o; gate, up; down
    assert work(policy) - work(policy, part=freeze_a) == 2 * B * T * L * R * inputs
    assert kept(policy, part=freeze_a) < kept(policy)


def test_names_of_the_policies_grow():
    names = [set(KEPT[policy]) for policy in POLICIES[1:]]
    assert all(more > less for more, less in zip(names, names[1:], strict=False)) and names[-1] == set()


def test_an_unknown_policy_is_refused():
    with pytest.raises(InputError, match="remat 'half' is none of everything, save_dots, no_mlp, attention, nothing"):
        abstract_params(problem("half")[0])
