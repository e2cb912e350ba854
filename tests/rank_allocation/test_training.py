"""Each rank allocation in the steps of a run: it trains, and goes on from a checkpoint with the same bits."""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, adapted, base_directory, config, init_adapters, load_peft, load_pretrained
from stablelora_jax.config.optimizer import OPTIMIZERS
from stablelora_jax.config.rank_allocation import CONFIGS, MIX_RANKS
from stablelora_jax.config.run import RunConfig
from stablelora_jax.jobs.kinds import require_together
from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.parallel import pmap_layout, to_host
from stablelora_jax.rank_allocation.adalora import orthogonality
from stablelora_jax.rank_allocation.dylora import drawn_rank
from stablelora_jax.runs import loop
from stablelora_jax.runs.build import make_allocation, make_hyperparams, make_training
from stablelora_jax.runs.directory import identity
from stablelora_jax.runs.run import run
from stablelora_jax.training.loss import summed_loss, target_positions
from stablelora_jax.training.step import init_state
from stablelora_jax.utils import tree
from tests.helpers import jit, long, soak, tiny_decoder
from tests.training.test_fast_path import batch_of

STEPS = 6
ADALORA = ("lora.parametrization=adalora", "lora.init=init_ab", "rank_allocation.target_rank=2")
ROWS = {  # further keys of a run
    "adalora": ("optimizer.name=adamw", *ADALORA),
    "cola": ("optimizer.name=stable_lora", "rank_allocation.length=3"),
    "dylora": ("optimizer.name=stable_lora", "lora.parametrization=dora"),
    "matryoshka": ("optimizer.name=lora_rite",),
    "squeeze": ("optimizer.name=lora_plus", "rank_allocation.target_rank=1"),
}
FURTHER = [(name, optimizer) for name in ROWS for optimizer in OPTIMIZERS if name != "dylora"]
# every optimizer with one member after another
BY_OPTIMIZER = [long(*row) if i % (len(OPTIMIZERS) + 1) % 4 == 0 else soak(*row) for i, row in enumerate(FURTHER)]


def run_config(name, *more):
    keys = ("lora.rank=4", "lora.target_modules=[q_proj]", "schedule.name=constant", "optimizer.learning_rate=5e-3")
    keys += ("batch_size=4",)
    return config.load(RunConfig, None, [f"rank_allocation.name={name}", f"steps={STEPS}", *keys, *more])


def setup_of(chosen):
    """What the loop uses of a run, for a small decoder, and the step as the run makes it."""
    model, params = tiny_decoder(num_hidden_layers=2)
    layout, own = pmap_layout(jax.devices()[:1]), make_allocation(chosen)
    adapters = init_adapters(jax.random.key(0), params, chosen.lora)
    adapters = own.start(adapters) if own.start else adapters
    tx, trained = make_training(chosen, params, adapters)
    numbers = make_hyperparams(chosen, adapters)
    return SimpleNamespace(
        config=chosen,
        layout=layout,
        model=adapted(model, chosen.lora),
        params=layout.place_base(params),
        plain=params,
        loader=None,
        tx=tx,
        trained=trained,
        allocation=own,
        hyperparams=layout.place_base(numbers),
        start=to_host(init_state(adapters, tx(numbers), jax.random.key(1))),
    )


SHORT = ("adalora", "cola", "dylora")
CASES = [(name, "") if name in SHORT else long(name, "") for name in ROWS] + BY_OPTIMIZER


@pytest.mark.parametrize("name,optimizer", CASES)
def test_it_trains_and_goes_on_from_what_was_saved(name, optimizer, monkeypatch):
    monkeypatch.setattr(loop, "batch_of_step", lambda loader, step, part: batch_of())
    setup = setup_of(run_config(name, *ROWS[name], *[f"optimizer.name={optimizer}"] * bool(optimizer)))
    step, states, losses = loop.make_step(setup), [setup.start], []
    for number in range(STEPS):
        placed, metrics = step(setup.layout.place_state(states[-1]), number)
        states.append(setup.layout.fetch(placed))
        losses.append(float(setup.layout.fetch(metrics)["loss"]))
    assert np.isfinite(losses).all() and int(states[-1].skipped) == 0 and (optimizer or losses[-1] < losses[0])
    placed = setup.layout.place_state(jax.tree.map(np.array, states[2]))  # a restart of cola and squeeze is at 2 or 3
    for number in range(2, STEPS):
        placed, _ = step(placed, number)
    for a, b in zip(jax.tree.leaves(setup.layout.fetch(placed)), jax.tree.leaves(states[-1]), strict=True):
        np.testing.assert_array_equal(a, b)
    setup.losses = losses
    LAWS[name](setup, states)


def at(state):
    return tree.get_in(state.adapters, ("model", "layers", "self_attn", "q_proj"))


def masked_to_budget(setup, states):
    """2 layers of mean rank 2 at the end."""
    assert (at(states[-1])["lora_e"] != 0).sum() == 4


def two_tied(setup, states):
    """Knots at steps 2 and 4 begin the latches and moments anew; what is tied is never trained."""
    assert list(setup.allocation.restarts) == [2, 4]
    tied = [at(state)["frozen_a"].any(axis=(0, 1)).reshape(2, 4).all(axis=1).tolist() for state in states]
    assert tied == [[False] * 2] * 3 + [[True, False]] * 2 + [[True, True]] * 2
    np.testing.assert_array_equal(at(states[3])["frozen_a"][..., :4], at(states[2])["lora_a"])
    np.testing.assert_array_equal(at(states[6])["frozen_a"][..., :4], at(states[3])["frozen_a"][..., :4])
    assert [int(state.opt_state.began) for state in states] == [0, 0, 0, 2, 2, 4, 4]
    assert int(states[-1].opt_state.count) == STEPS


def squeezed_twice(setup, states):
    """To rank 2 before step 2, to 1 before step 4; the other ranks are zero in both factors and stay so."""
    for state, rank in zip(states, (4, 4, 4, 2, 2, 1, 1), strict=True):
        used = at(state)["lora_a"].any(axis=(0, 1)) | at(state)["lora_b"].any(axis=(0, 2))
        assert used.tolist() == [i < rank for i in range(4)]


def one_rank_a_step(setup, states):
    """B is zero at first, and only its row of the drawn rank moves in the first step."""
    rank = drawn_rank(jax.random.fold_in(jax.random.wrap_key_data(states[0].key), 0), setup.config.lora)
    assert at(states[1])["lora_b"].any(axis=(0, 2)).tolist() == [i == int(rank) - 1 for i in range(4)]


def nested_sums(setup, states):
    """The reported loss is that of the nested sum."""
    seen = setup.allocation.seen(states[-2].adapters, None)
    losses = [
        summed_loss(setup.model, {"params": setup.plain, "lora": x}, batch_of()) for x in (seen, states[-2].adapters)
    ]
    counted = target_positions(batch_of())[1].sum()
    np.testing.assert_allclose(losses[0] / counted, setup.losses[-1], rtol=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-3 or setup.config.optimizer.name != "lora_rite"  # some move little at first


LAWS = {
    "adalora": masked_to_budget,
    "cola": two_tied,
    "dylora": one_rank_a_step,
    "matryoshka": nested_sums,
    "squeeze": squeezed_twice,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_that_move_all_ranks_are_known(name):
    """DyLoRA is for those whose updates leave alone a rank that never had a gradient."""
    rng, has = np.random.default_rng(0), inspect.signature(OPTIMIZERS[name]).parameters
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"p": {"lora_a": draw(6, 3), "lora_b": draw(3, 5)}}
    plain = {"weight_decay": 0.0, "shrink_ratio": 0.0, "scale": 1.0}
    tx = OPTIMIZERS[name](1e-3, **{key: value for key, value in plain.items() if key in has})

    @jit
    def updated(params, state, a, b):
        grads = {"p": {"lora_a": a.at[:, 1:].set(0), "lora_b": b.at[1:].set(0)}}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    after, state = params, tx.init(params)
    for _ in range(3):
        after, state = updated(after, state, draw(6, 3), draw(3, 5))
    moved = jax.tree.map(lambda new, old: np.abs(new - old), after["p"], params["p"])
    assert (max(moved["lora_a"][:, 1:].max(), moved["lora_b"][1:].max()) > 1e-6) == (name in MIX_RANKS)


def test_senseless_pairs_are_refused_and_none_is_the_default():
    assert RunConfig().rank_allocation is None and "rank_allocation" not in identity(RunConfig())
    assert identity(run_config("dylora"))["rank_allocation"] == {"name": "dylora", "frozen": True}
    assert set(CONFIGS) == set(ROWS) and set(MIX_RANKS) <= {*OPTIMIZERS, "riemannian"}
    with pytest.raises(InputError, match="rank_allocation: dylora trains some ranks .* optimizer lora_rite moves all"):
        run_config("dylora", "optimizer.name=lora_rite")
    with pytest.raises(InputError, match="rank_allocation: dylora orders the ranks .* not 'miss'"):
        run_config("dylora", "optimizer.name=adamw", "lora.parametrization=miss")
    with pytest.raises(InputError, match="rank_allocation.name wants .*adalora.*, got"):
        run_config("evaa")
    with pytest.raises(InputError, match="rank_allocation.frozen is not a key of .*=cola, but of dylora"):
        run_config("cola", "rank_allocation.frozen=true")
    alone = SimpleNamespace(config=run_config("cola"))
    with pytest.raises(InputError, match=r"jobs.a: rank_allocation is for a run alone"):
        require_together(["a"], [alone])
    assert run_config("matryoshka", "rank_allocation.ranks=[1, 4]").rank_allocation.ranks == (1, 4)
    for name, row in ROWS.items():
        assert config.load(RunConfig, None, []) != run_config(name, *row)
        assert "rank_allocation." in config.help_text(RunConfig, f"rank_allocation.{name}")


def test_the_penalty_is_counted_once(monkeypatch):
    """Whatever the number of micro-batches; e is zero, so A and B have no other gradient. The loss is the data's."""
    monkeypatch.setattr(loop, "batch_of_step", lambda loader, step, part: batch_of())
    more = ("gradient_accumulation_steps=2", "rank_allocation.orth_reg_weight=1000.0")
    setup = setup_of(run_config("adalora", *ROWS["adalora"], *more))
    _, metrics = loop.make_step(setup)(setup.layout.place_state(setup.start), 0)
    found = setup.layout.fetch(metrics)
    slope = jit(jax.grad(lambda x: 1000 * orthogonality(x, setup.config.lora)))(setup.start.adapters)
    np.testing.assert_allclose(found["gradient_norm"], optax.tree.norm(slope), rtol=1e-2)
    assert found["loss"] < 10


@pytest.mark.long
def test_a_run_saves_what_its_budget_has_left(tmp_path):
    """In PEFT's layout, of ranks that differ by module; through validation and export."""
    small = ("batch_size=8", "task.train_limit=32", "task.validation_limit=8", "max_length=32", "num_samples=0")
    chosen = run_config("adalora", *ROWS["adalora"], *small, f"output={tmp_path / 'r'}")
    run(chosen, lambda _: None)
    _, params, *_ = load_pretrained(base_directory())
    adapters, spec = load_peft(tmp_path / "r" / "adapter", params)
    (target,) = adapter_target_modules(adapters, spec).values()
    assert sum(target.ranks) == 2 * len(target.ranks) and len(set(target.ranks)) > 1
