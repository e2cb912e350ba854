"""Objectives over pairs, in the training step: against all logits on one device, and by their identities."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters
from stablelora_jax.config import load
from stablelora_jax.config.run import RunConfig
from stablelora_jax.data import Example, Text, make_batch
from stablelora_jax.data.encoding import preference_texts
from stablelora_jax.data.loader import Loader, batch_of_step
from stablelora_jax.data.tasks.question import Problem, Question
from stablelora_jax.data.token_cache import TokenStore
from stablelora_jax.objectives import dpo, orpo, simpo
from stablelora_jax.parallel import mesh_layout, pmap_layout
from stablelora_jax.runs.build import make_objective
from stablelora_jax.runs.dry_run import dry_run
from stablelora_jax.runs.prepare import require_groups
from stablelora_jax.training.cross_entropy import token_log_probs
from stablelora_jax.training.step import init_state, make_train_step
from tests.helpers import jit, largest_difference, long, tiny_decoder, trained

SPEC = LoraSpec(rank=2, target_modules=["q_proj", "down_proj"])


def pairs_batch(rows=16, pad=2):
    """Pairs of rows, the last ``pad`` rows empty."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(4, 20, rows - pad)
    made = [Example(tuple(map(int, rng.integers(0, 31, n))), int(rng.integers(1, n))) for n in sizes]
    return make_batch(made, rows=rows)


def by_hand(name, model, params, adapters, batch):
    """The mean over pairs, from all logits."""
    real = batch.loss_mask.sum(axis=1) > 0
    lengths = jnp.asarray(batch.loss_mask[real].sum(axis=1))

    def sums(variables):
        logits = adapted(model, SPEC).apply(variables, batch.tokens, batch.positions, batch.segment_ids)
        return (token_log_probs(logits, batch.tokens) * batch.loss_mask).sum(axis=1)[real]

    policy, base = sums({"params": params, "lora": adapters}), sums({"params": params})
    if name == "dpo":
        return dpo(policy[::2], policy[1::2], base[::2], base[1::2], beta=0.1).mean()
    return {"orpo": orpo, "simpo": simpo}[name](policy[::2], policy[1::2], lengths[::2], lengths[1::2]).mean()


CASES = [
    ("dpo", "pmap", 1),
    ("simpo", "mesh", 1),
    long("dpo", "mesh", 1),
    long("orpo", "pmap", 1),
    long("dpo", "pmap", 2),
]
LAYOUTS = {
    "pmap": pmap_layout,
    "mesh": lambda: mesh_layout(2, 2, 2, key_value_heads=2),
}


@pytest.mark.parametrize("name,layout,accumulate", CASES)
def test_a_step_is_that_of_all_logits(name, layout, accumulate):
    (model, params), place = tiny_decoder(), LAYOUTS[layout]()
    batch = pairs_batch(16 * accumulate)
    adapters, tx = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC), optax.sgd(0.1)
    objective = make_objective(load(RunConfig, None, [f"objective.name={name}"]))
    step = make_train_step(adapted(model, SPEC), tx, place, objective=objective, accumulate=accumulate)
    state = jax.tree.map(np.asarray, init_state(adapters, tx, jax.random.key(1)))
    state, metrics = step(place.place_state(state), place.place_base(params), place.split(batch))
    value, grads = jit(jax.value_and_grad(partial(by_hand, name, model, params, batch=batch)))(adapters)
    np.testing.assert_allclose(place.fetch(metrics)["loss"], value, rtol=1e-5)
    expected = jax.tree.map(lambda x, g: x - 0.1 * g, adapters, grads)
    assert largest_difference(place.fetch(state).adapters, expected) < 1e-5
    assert largest_difference(expected, adapters) > 1e-4


def test_adapters_that_change_nothing_give_log_2():
    (model, params), batch = tiny_decoder(), pairs_batch()
    adapters = init_adapters(jax.random.key(0), params, SPEC)
    objective = make_objective(load(RunConfig, None, ["objective.name=dpo"]))
    variables = {"params": params, "lora": adapters}
    value = jit(lambda v: objective.loss(adapted(model, SPEC), v, batch, None, 1) / objective.divisor(batch))(variables)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)


@pytest.mark.long
def test_the_reference_needs_no_second_base_and_next_to_no_memory():
    """Of the compiled steps over as many tokens."""
    sft, own = (
        dry_run(load(RunConfig, None, [f"objective.name={name}", "batch_size=16", "max_length=128"]), lambda _: None)
        for name in ("sft", "dpo")
    )
    assert own["arguments"] == sft["arguments"] and own["temporaries"] <= 1.15 * sft["temporaries"]


def test_pairs_of_questions():
    """Right answers first; the same pairs for the same seed; all wrong answers occur."""
    questions = [Question("Q:", (" a", " b", " c"), i % 3, f"q{i}") for i in range(30)]
    texts = preference_texts(questions, seed=1)
    assert texts == preference_texts(questions, seed=1) != preference_texts(questions, seed=2)
    for question, right, wrong in zip(questions, texts[::2], texts[1::2], strict=True):
        assert right == Text("Q:", question.choices[question.label], question.id)
        assert wrong.answer in set(question.choices) - {right.answer}
    assert {text.answer for text in texts[1::2]} == {" a", " b", " c"}
    with pytest.raises(InputError, match="p0 has nothing to prefer its answer to"):
        preference_texts([Problem("a", " b", None, "p0")], 0)


def test_pairs_stay_together_in_every_step():
    lengths = np.full(12, 3, np.int32)
    tokens = np.repeat(np.arange(12, dtype=np.int32), 3)
    store = TokenStore(tokens, lengths, lengths - 1, lengths, np.cumsum(lengths), 0, "")
    loader = Loader(store, None, 32, 4, 0, {32: 16}, group=2)
    firsts = np.concatenate([batch_of_step(loader, step).tokens[:, 0] for step in range(3)])
    assert (firsts[::2] % 2 == 0).all() and (firsts[1::2] == firsts[::2] + 1).all()
    assert sorted(firsts) == list(range(12)) and list(firsts) != list(range(12))


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["objective.name=dpo", "data.batching=pack"], "takes pairs of rows: say data.batching=bucket"),
        (["objective.name=dpo", "batch_size=8"], "batch_size must be a multiple of 16, not 8"),
        (["objective.name=simpo", "objective.gamma=-1"], "gamma must be a number in"),
    ],
)
def test_refusals(overrides, message):
    with pytest.raises(InputError, match=message):
        require_groups(load(RunConfig, None, overrides), pmap_layout())
