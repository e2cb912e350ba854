"""Several jobs in one step are as each alone: in float64 to 1e-9, whatever they differ in."""

import functools
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import LoraSpec, adapted, init_adapters, lora_hyperparams, lora_rite, stable_lora
from stablelora_jax.data import Example, make_batch
from stablelora_jax.jobs import step as module
from stablelora_jax.jobs.kinds import Kind, leaf_shapes
from stablelora_jax.jobs.plan import passes, row_lengths, rows_of_pass
from stablelora_jax.jobs.step import make_jobs_step
from stablelora_jax.lora.combine.union import covering_spec
from stablelora_jax.optimizers import freeze_a
from stablelora_jax.parallel import pmap_layout
from stablelora_jax.training.step import Hyperparams, init_state, make_train_step
from tests.helpers import largest_difference, soak, tiny_decoder

SPEC = LoraSpec(target_modules=("q_proj", "v_proj"), rank=2)
CLIPPED = lambda hp: optax.chain(optax.clip_by_global_norm(0.5), stable_lora(hp.rates["r"], hp.numbers["shrink"]))
RITE = lambda hp: lora_rite(hp.rates["r"])
SGD = lambda hp: optax.sgd(hp.rates["r"], momentum=0.9)
whole = lambda adapters: adapters
JOBS = [  # name of the kind, spec, optimizer, trained part, learning rate, rows, longest text, steps
    ("stable", SPEC, CLIPPED, whole, 0.02, 4, 30, 6),
    ("stable", replace(SPEC, alpha=32, dropout=0.4), CLIPPED, whole, 0.01, 7, 48, 4),
    ("rite", LoraSpec(target_modules=("q_proj", "down_proj"), rank=4, dropout=0.2), RITE, whole, 0.02, 2, 20, 6),
    ("wide", LoraSpec(target_modules="all-linear", rank=3, layers_to_transform=(0, 2)), SGD, whole, 0.1, 5, 40, 5),
    ("frozen", LoraSpec(target_modules=("q_proj", "lm_head"), rank=1, dropout=0.3), SGD, freeze_a, 0.3, 3, 30, 6),
]  # fmt: skip
STEPS = [job[-1] for job in JOBS]


def batches(number):
    *_, rows, longest, steps = JOBS[number]
    rng = np.random.default_rng(number)

    def example():
        n = int(rng.integers(3, longest))
        return Example(tuple(map(int, rng.integers(0, 31, n))), int(rng.integers(1, n)))

    return [make_batch([example() for _ in range(rows)], max_loss_tokens=longest) for _ in range(steps)]


@pytest.fixture(scope="module")
def world():
    jax.config.update("jax_enable_x64", True)
    model, params = tiny_decoder(jnp.float64, tie_word_embeddings=False)
    starts, numbers = [], []
    for i, (_, spec, make, _, rate, *_) in enumerate(JOBS):
        adapters = init_adapters(jax.random.key(i), params, spec, dtype=jnp.float64)
        hp = Hyperparams({"r": jnp.float64(rate)}, lora_hyperparams(spec, adapters), {"shrink": jnp.float64(0.3)})
        start = init_state(adapters, make(hp), jax.random.key(100 + i))
        starts.append(jax.tree.map(np.asarray, start))
        numbers.append(jax.tree.map(np.asarray, hp))
    yield model, params, starts, numbers
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def alone(world):
    """Of each job trained by itself on one device: the states and the losses after each step."""
    model, params, starts, numbers = world
    layout = pmap_layout(jax.devices()[:1])
    found = []
    for i, (_, spec, make, trained, *_) in enumerate(JOBS):
        step = make_train_step(adapted(model, spec), make, layout, trained=trained)
        placed, states, metrics = layout.place_state(starts[i]), [], []
        base, hp = layout.place_base(params), layout.place_base(numbers[i])
        for batch in batches(i):
            placed, own = step(placed, base, layout.split(batch), hp)
            states.append(layout.fetch(placed))
            metrics.append(layout.fetch(own))
        found.append((states, metrics))
    return found


class Together:
    """The jobs side by side over four devices, in passes of ``tokens``."""

    def __init__(self, world, tokens, devices=4):
        model, self.params, starts, self.numbers = world
        self.layout, self.tokens = pmap_layout(jax.devices()[:devices]), tokens
        names = list(dict.fromkeys(job[0] for job in JOBS))
        members = {name: tuple(i for i, job in enumerate(JOBS) if job[0] == name) for name in names}
        first = [JOBS[jobs[0]] for jobs in members.values()]
        self.kinds = [Kind(jobs, len(jobs), job[2], job[3]) for jobs, job in zip(members.values(), first, strict=True)]
        self.order = [i for kind in self.kinds for i in kind.jobs]  # the job in each slot
        adapters = [start.adapters for start in starts]
        spec = covering_spec([(one, job[1]) for one, job in zip(adapters, JOBS, strict=True)])
        shapes = leaf_shapes(adapters)
        self.last, self.before = make_jobs_step(adapted(model, spec), self.kinds, shapes, self.layout, dropout=True)
        stack = lambda *x: np.stack(x)
        self.starts = tuple(jax.tree.map(stack, *(starts[i] for i in kind.jobs)) for kind in self.kinds)
        hp = tuple(jax.tree.map(stack, *(self.numbers[i] for i in kind.jobs)) for kind in self.kinds)
        self.hp, self.base = self.layout.place_base(hp), self.layout.place_base(self.params)
        self.begin()

    def begin(self):
        """All jobs at their start; what is compiled stays."""
        self.state = self.layout.place_state(self.starts)
        return self

    def round(self, jobs):
        """One step of each of ``jobs``, {number: batch}; metrics by job."""
        parts = self.layout.parts
        plan = passes({i: row_lengths(batch) for i, batch in jobs.items()}, self.tokens, parts)
        slots, sums = {i: slot for slot, i in enumerate(self.order)}, None
        for own in plan:
            room = dict(tokens=self.tokens, parts=parts, loss_positions=60, dtype=np.dtype(np.float64))
            rows = self.layout.split(rows_of_pass(own, jobs, slots, **room))
            given = (self.state, sums, self.base, rows, self.hp)
            sums = self.before(*given) if own is not plan[-1] else None
        ends = tuple(np.array([i in jobs for i in kind.jobs]) for kind in self.kinds)
        self.state, metrics = self.last(*given, self.layout.place_base(ends))
        return self.by_job(self.layout.fetch(metrics)), len(plan)

    def by_job(self, trees):
        slices = lambda own, count: [jax.tree.map(lambda x, j=j: x[j], own) for j in range(count)]
        of_kind = [slices(own, kind.slots) for kind, own in zip(self.kinds, trees, strict=True)]
        return dict(zip(self.order, [one for own in of_kind for one in own], strict=True))

    def states(self):
        return self.by_job(self.layout.fetch(self.state))


@pytest.fixture(scope="module")
def together(world):
    """The jobs side by side at their start, by the tokens of a pass; compiled once for all tests."""
    made = functools.cache(partial(Together, world))
    return lambda tokens: made(tokens).begin()


@pytest.mark.parametrize("tokens", [soak(4096), 512])
def test_jobs_side_by_side_are_as_each_alone(together, alone, tokens):
    """Ranks, targets, layers, an adapted head, scales, dropout, optimizers, clipping, rows, lengths, steps."""
    together, given = together(tokens), [batches(i) for i in range(len(JOBS))]
    for step in range(max(STEPS)):
        before = together.states()
        now = {i: own[step] for i, own in enumerate(given) if step < STEPS[i]}
        metrics, count = together.round(now)
        assert step or (count > 1) == (tokens == 512)
        after = together.states()
        for i in range(len(JOBS)):
            if i not in now:
                chex.assert_trees_all_equal(after[i], before[i])  # an absent job keeps its bits
                continue
            state, own = (found[step] for found in alone[i])
            assert largest_difference(after[i].adapters, state.adapters) < 1e-9, (i, step)
            assert largest_difference(after[i].opt_state, state.opt_state) < 1e-9, (i, step)
            assert after[i].step == state.step and after[i].skipped == state.skipped == 0
            for name in ("loss", "gradient_norm", "norm_a", "norm_b_max"):
                assert abs(metrics[i][name] / own[name] - 1) < 1e-9, (i, step, name)
            chex.assert_trees_all_equal(metrics[i]["latches"], own["latches"])
    assert any(not latch.all() for latch in jax.tree.leaves(alone[0][1][-1]["latches"])), "some pair has stopped"


def test_a_job_that_is_not_finite_skips_its_step_and_no_other_does(world, together, alone):
    together, given = together(512), [batches(i) for i in range(len(JOBS))]
    bad = given[3][0]._replace(tokens=np.where(given[3][0].loss_mask == 1, 10**6, given[3][0].tokens))
    metrics, _ = together.round({0: given[0][0], 3: bad})
    after = together.states()
    assert metrics[3]["skipped"] == 1 and after[3].skipped == 1 and after[3].step == 1
    chex.assert_trees_all_equal(after[3].adapters, world[2][3].adapters)
    assert metrics[0]["skipped"] == 0 and largest_difference(after[0].adapters, alone[0][0][0].adapters) < 1e-9


@pytest.mark.long
def test_the_base_is_multiplied_once_and_lengths_alone_compile(world, monkeypatch):
    """Another job, another number of rows or another learning rate is no new program."""
    monkeypatch.setattr(module, "weighted_losses", counted := Counted(module.weighted_losses))
    together = Together(world, 2048, devices=1)
    for i in range(3):
        together.round({i: batches(i)[0]})
    together.hp = jax.tree.map(lambda x: x / 2, together.hp)
    together.round({i: batches(i)[1] for i in (0, 2, 4)})
    assert counted.calls == len(counted.lengths)


class Counted:
    def __init__(self, function):
        self.function, self.calls, self.lengths = function, 0, set()

    def __call__(self, model, variables, batch, *rest, **options):
        self.calls += 1
        self.lengths.add(batch.tokens.shape[1])
        return self.function(model, variables, batch, *rest, **options)
