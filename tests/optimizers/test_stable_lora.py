"""Stable-LoRA against a float64 transcription of its rule, and everything it must compose with."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from stablelora_jax import InputError, shrink_until_stable, stable_lora, still_shrinking
from stablelora_jax.optimizers.stable_lora import OFF, ON, PADDING, ShrinkUntilStableState

STEPS = 200


def reference(a, b, grads, rates, ratio, weight_decay, b1=0.9, b2=0.999, eps=1e-8):
    """The rule for one pair in NumPy: (a_t, b_t, latch_t) after each step; grads is a list of (gA, gB)."""
    a, b, on = np.array(a), np.array(b), True
    m, v = [np.zeros_like(a), np.zeros_like(b)], [np.zeros_like(a), np.zeros_like(b)]
    history = []
    for t, ((grad_a, grad_b), rate) in enumerate(zip(grads, rates, strict=True), start=1):
        if on:
            if np.sqrt((a**2).sum()) < a.size / b.size * np.sqrt((b**2).sum()):
                on = False
            else:
                a = (1 - ratio) * a
        new = []
        for i, (p, g) in enumerate(((a, grad_a), (b, grad_b))):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            p = p - rate * weight_decay * p
            new.append(p - rate * (m[i] / (1 - b1**t)) / (np.sqrt(v[i] / (1 - b2**t)) + eps))
        a, b = new
        history.append((a, b, on))
    return history


# name: (shape of A, shape of B, size of A, size of B) -- stacked pairs are compared with their separate slices
SHAPES = {
    "tall": ((12, 3), (3, 5), 1.0, 0.0),
    "wide": ((4, 2), (2, 9), 1.0, 0.0),
    "square": ((6, 6), (6, 6), 0.3, 0.0),
    "stable_from_step_1": ((5, 2), (2, 5), 0.01, 3.0),
    "stacked": ((3, 7, 2), (3, 2, 4), 0.5, 0.0),
    "experts": ((2, 2, 6, 3), (2, 2, 3, 8), 0.2, 0.05),
}


def make_tree(dtype):
    rng = np.random.default_rng(0)
    sizes = {name: (rng.normal(size=sa) * fa, rng.normal(size=sb) * fb) for name, (sa, sb, fa, fb) in SHAPES.items()}
    for pair in sizes.values():  # stacks whose slices latch at different steps
        if pair[0].ndim > 2:
            pair[0][...] *= np.geomspace(0.05, 1, pair[0][..., 0, 0].size).reshape(*pair[0].shape[:-2], 1, 1)
    return {name: {"lora_a": jnp.asarray(a, dtype), "lora_b": jnp.asarray(b, dtype)} for name, (a, b) in sizes.items()}


def gradients(params, step, dtype):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) + 0.5, dtype), params)


def slices(array, depth):
    return array.reshape(-1, *array.shape[depth:])


def run(dtype, ratio, decay, schedule, jit=True):
    params = make_tree(dtype)
    tx = stable_lora(schedule, shrink_ratio=ratio, weight_decay=decay)
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    trajectory, latches, steps = [params], [], []
    for step in range(STEPS):
        grads = gradients(params, step, dtype)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
        latches.append(still_shrinking(state))
        steps.append(grads)
    return trajectory, latches, steps


def schedule64(count):
    return 2e-2 * (0.5 + 0.5 * jnp.cos(jnp.asarray(count, jnp.float64) / 90))


@pytest.mark.parametrize("ratio,decay", [(5e-3, 0.05), (0.02, 0.0), (0.0, 0.1)])
def test_trajectory_equals_the_rule_in_float64(x64, ratio, decay):
    trajectory, latches, grads = run(jnp.float64, ratio, decay, schedule64)
    rates = [float(schedule64(t)) for t in range(STEPS)]
    flips = set()
    for name, pair in trajectory[0].items():
        depth = pair["lora_a"].ndim - 2
        for i in range(len(slices(np.asarray(pair["lora_a"]), depth))):
            pick = lambda tree, leaf, name=name, depth=depth, i=i: slices(np.asarray(tree[name][leaf]), depth)[i]
            own = [(pick(g, "lora_a"), pick(g, "lora_b")) for g in grads]
            expected = reference(pick(trajectory[0], "lora_a"), pick(trajectory[0], "lora_b"), own, rates, ratio, decay)
            label = list(n for n in latches[0] if n.split("[")[0] == name)[i]
            for t, (a, b, on) in enumerate(expected, start=1):
                np.testing.assert_allclose(pick(trajectory[t], "lora_a"), a, rtol=0, atol=1e-12)
                np.testing.assert_allclose(pick(trajectory[t], "lora_b"), b, rtol=0, atol=1e-12)
                assert latches[t - 1][label] == on
            flips.add(next((t for t, (_, _, on) in enumerate(expected) if not on), None))
    assert len(flips) >= 4 and 0 in flips, "the case must hold latches that flip at different steps, one at once"


def test_trajectory_in_float32():
    trajectory, latches, grads = run(jnp.float32, 5e-3, 0.05, 1e-2)
    for name, pair in trajectory[0].items():
        if pair["lora_a"].ndim > 2:
            continue
        own = [(np.float64(g[name]["lora_a"]), np.float64(g[name]["lora_b"])) for g in grads]
        start = (np.float64(pair["lora_a"]), np.float64(pair["lora_b"]))
        expected = reference(*start, own, [1e-2] * STEPS, 5e-3, 0.05)
        for t, (a, b, _) in enumerate(expected, start=1):
            np.testing.assert_allclose(trajectory[t][name]["lora_a"], a, rtol=0, atol=1e-5)
            np.testing.assert_allclose(trajectory[t][name]["lora_b"], b, rtol=0, atol=1e-5)
        assert latches[-1][name] == expected[-1][2]


def same_bits(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(*map(jax.tree.leaves, jax.device_get((a, b))), strict=True))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_ratio_zero_is_adamw_to_the_last_bit(jit, decay):
    params = make_tree(jnp.float32)
    ours, theirs = stable_lora(1e-3, shrink_ratio=0, weight_decay=decay), optax.adamw(1e-3, weight_decay=decay)
    apart = {"xla_cpu_parallel_codegen_split_count": 32}  # XLA's default: in one LLVM module sums are contracted anew
    wrap = partial(jax.jit, compiler_options=apart) if jit else (lambda f: f)
    update, update_adamw = wrap(ours.update), wrap(theirs.update)
    state, state_adamw = ours.init(params), theirs.init(params)
    for step in range(5):
        grads = gradients(params, step, jnp.float32)
        if step == 0:  # as at B = 0: A has no gradient, and zero updates keep their sign
            grads = {k: {**g, "lora_a": 0 * g["lora_a"]} for k, g in grads.items()}
        updates, state = update(grads, state, params)
        expected, state_adamw = update_adamw(grads, state_adamw, params)
        assert same_bits(updates, expected)
        params = optax.apply_updates(params, updates)


def test_stacked_pair_equals_separate_pairs():
    params, tx = make_tree(jnp.float32), stable_lora(1e-2, shrink_ratio=1e-2, weight_decay=0.1)
    stack = params["stacked"]
    alone = {str(i): jax.tree.map(lambda x, i=i: x[i], stack) for i in range(3)}
    states = tx.init({"p": stack}), tx.init(alone)
    stack, many, update = {"p": stack}, alone, jax.jit(tx.update)
    for step in range(60):
        grads = gradients(stack, step, jnp.float32)
        apart = {str(i): jax.tree.map(lambda x, i=i: x[i], grads["p"]) for i in range(3)}
        u, s0 = update(grads, states[0], stack)
        v, s1 = update(apart, states[1], many)
        states, stack, many = (s0, s1), optax.apply_updates(stack, u), optax.apply_updates(many, v)
        for i in range(3):
            chex.assert_trees_all_close(
                jax.tree.map(lambda x, i=i: x[i], stack["p"]), many[str(i)], atol=1e-6, rtol=1e-6
            )
    assert list(still_shrinking(states[0]).values()) == list(still_shrinking(states[1]).values())


def test_latches_never_come_back_and_are_per_pair():
    _, latches, _ = run(jnp.float32, 1e-2, 0.01, 2e-2)
    for before, after in zip(latches, latches[1:], strict=False):
        assert all(before[name] or not after[name] for name in before)
    assert len(set(latches[len(latches) // 4].values())) == 2


@settings(max_examples=8, deadline=None)
@given(ratio=st.floats(1e-4, 0.2), steps=st.integers(1, 12))
def test_without_learning_only_the_shrink_acts(ratio, steps):
    params = {"p": {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.zeros((2, 3))}}
    tx = stable_lora(0.0, shrink_ratio=ratio)
    state, start = tx.init(params), params
    for step in range(steps):
        updates, state = tx.update(gradients(params, step, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    expected = (1 - ratio) ** steps * np.asarray(start["p"]["lora_a"])
    np.testing.assert_allclose(params["p"]["lora_a"], expected, rtol=1e-5)
    assert not params["p"]["lora_b"].any()


def test_the_shrink_reaches_a_float32_pair():
    """One shrink by 5e-4 is below half a bfloat16 ulp, which is why adapters are float32."""
    params = {"p": {"lora_a": jnp.full((4, 2), 0.1), "lora_b": jnp.zeros((2, 4))}}
    tx = stable_lora(0.0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert (optax.apply_updates(params, updates)["p"]["lora_a"] < params["p"]["lora_a"]).all()


def composed(kind):
    stable = stable_lora(1e-2, shrink_ratio=1e-2, weight_decay=0.1)
    return {
        "clip": optax.chain(optax.clip_by_global_norm(1.0), stable),
        "multi_steps": optax.MultiSteps(
            optax.chain(optax.clip_by_global_norm(1.0), stable), 3
        ).gradient_transformation(),
        "inject": optax.inject_hyperparams(stable_lora)(learning_rate=1e-2, shrink_ratio=1e-2, weight_decay=0.1),
        "schedules": stable_lora(optax.cosine_decay_schedule(1e-2, 50), optax.linear_schedule(2e-2, 0.0, 40)),
        "other_inner": shrink_until_stable(optax.chain(optax.scale_by_lion(), optax.scale(-1e-3)), 1e-2),
        "masked_whole": optax.masked(stable, {name: name != "tall" for name in SHAPES}),
    }[kind]


@pytest.mark.parametrize("kind", ["clip", "multi_steps", "inject", "schedules", "other_inner", "masked_whole"])
def test_composes_and_compiles_once(kind):
    params, tx = make_tree(jnp.float32), composed(kind)
    state = tx.init(params)
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for step in range(7):
        updates, state = update(gradients(params, step, jnp.float32), state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        params = optax.apply_updates(params, updates)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure
    chex.assert_tree_all_finite(params)
    assert any(still_shrinking(state).values())
    chex.clear_trace_counter()


@pytest.mark.parametrize("stop_rule", [True, False])
def test_without_the_stop_rule_a_stable_pair_shrinks_on(stop_rule):
    params = {"p": {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.full((2, 3), 9.0)}}  # ||A|| / 5 < ||B|| / 3
    tx = stable_lora(0.0, shrink_ratio=0.1, stop_rule=stop_rule)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["p"]["lora_a"], 1.0 if stop_rule else 0.9**3, rtol=1e-6)
    assert still_shrinking(state) == {"p": not stop_rule}


def test_multi_steps_shrinks_once_per_real_step():
    params = {"p": {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.zeros((2, 3))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    inside = optax.MultiSteps(stable_lora(0.0, shrink_ratio=0.1), 4)
    state = inside.init(params)
    for _ in range(4):
        updates, state = inside.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["p"]["lora_a"], 0.9, rtol=1e-6)


def test_leaves_outside_pairs_see_the_inner_optimizer_alone():
    extra = {
        "magnitude": jnp.ones(3),
        "p": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 3)), "bias": jnp.ones(3)},
    }
    grads = jax.tree.map(lambda x: x + 0.5, extra)
    ours, theirs = stable_lora(1e-2, shrink_ratio=0.1), optax.adamw(1e-2, weight_decay=0.01)
    updates, _ = ours.update(grads, ours.init(extra), extra)
    expected, _ = theirs.update(grads, theirs.init(extra), extra)
    assert same_bits((updates["magnitude"], updates["p"]["bias"]), (expected["magnitude"], expected["p"]["bias"]))


@pytest.mark.parametrize("ratio", [1.0, 2, -1e-9, float("nan"), float("inf")])
def test_a_ratio_outside_the_unit_interval_is_refused(ratio):
    with pytest.raises(InputError, match="shrink_ratio"):
        stable_lora(1e-3, shrink_ratio=ratio)


def test_a_half_hidden_pair_is_named():
    params = {"deep": {"p": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 3))}}}
    mask = {"deep": {"p": {"lora_a": True, "lora_b": False}}}
    with pytest.raises(InputError, match=r"deep\.p.*lora_b is hidden"):
        optax.masked(stable_lora(1e-3), mask).init(params)


def test_a_pair_of_wrong_shapes_is_named():
    params = {"p": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((4, 3))}}
    with pytest.raises(InputError, match="p: lora_a"):
        stable_lora(1e-3).init(params)


def test_params_are_needed():
    params = {"p": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 3))}}
    tx = stable_lora(1e-3)
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))


def test_still_shrinking_names_layers_and_leaves_padding_out():
    a = jnp.ones((3, 4, 2)).at[1].set(0)
    params = {"model": {"layers": {"attn": {"q_proj": {"lora_a": a, "lora_b": jnp.zeros((3, 2, 4))}}}}}
    state = optax.chain(optax.clip(1.0), stable_lora(1e-3)).init(params)
    assert still_shrinking(state) == {"model.layers.0.attn.q_proj": True, "model.layers.2.attn.q_proj": True}
    latch = state[1].shrinking["model"]["layers"]["attn"]["q_proj"]
    assert latch.dtype == jnp.int8 and latch.tolist() == [ON, PADDING, ON] and OFF == 0
    assert list(still_shrinking(state, stacked=("model",))) == [f"model.{i}.layers.attn.q_proj" for i in (0, 2)]
    with pytest.raises(InputError, match="no latches"):
        still_shrinking(optax.adam(1e-3).init(params))


def test_state_is_the_inner_state_and_one_byte_a_pair():
    params = make_tree(jnp.float32)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    state, adamw = stable_lora(1e-3).init(params), optax.adamw(1e-3).init(params)
    assert isinstance(state, ShrinkUntilStableState)
    assert size(state) - size(adamw) == sum(int(np.prod(shape[0][:-2])) for shape in SHAPES.values())


def test_init_works_on_shapes_alone():
    params = jax.eval_shape(lambda: make_tree(jnp.float32))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(stable_lora(1e-3).init, params), stable_lora(1e-3).init(make_tree(jnp.float32))
    )


def equations(jaxpr, into_cond):
    """Names of all primitives, those inside the branches of a cond only if ``into_cond``."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name != "cond" or into_cond:
            for inner in jaxprs_in_params(eqn.params):
                yield from equations(inner, into_cond)


def test_norms_stand_in_a_cond_that_is_skipped_once_all_latches_are_off():
    params, tx = make_tree(jnp.float32), stable_lora(1e-3)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    assert "reduce_sum" in equations(jaxpr, True) and "reduce_sum" not in equations(jaxpr, False)
    (cond,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond")
    off, on = (list(equations(branch.jaxpr, True)) for branch in cond.params["branches"])
    assert "reduce_sum" in on and not {"reduce_sum", "sqrt", "mul", "lt"} & set(off)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert "conditional(" in text


def test_a_shrink_that_rounds_away_is_refused():
    params = {"p": {"lora_a": jnp.ones((4, 2), jnp.bfloat16), "lora_b": jnp.zeros((2, 4), jnp.bfloat16)}}
    with pytest.raises(InputError, match="p: in bfloat16 a shrink by 0.0005 changes nothing"):
        stable_lora(1e-3).init(params)
    stable_lora(1e-3, shrink_ratio=0.1).init(params)
