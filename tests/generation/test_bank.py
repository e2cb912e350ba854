"""A bank of adapters: each row as if alone with its adapter, one program for any adapters, and errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters
from stablelora_jax.generation.bank import banked, make_bank, replace_adapter
from tests.helpers import FOREIGN, random_params, tiny_decoder, tokens, trained

MODEL, PARAMS = tiny_decoder()
SPECS = [
    LoraSpec(rank=2),
    LoraSpec(rank=4, target_modules=["v_proj", "down_proj"], scaling="rslora", alpha=3),
    LoraSpec(rank=3, target_modules="all-linear", rank_pattern={"layers.1.*q_proj": 1}, alpha_pattern={"k_proj": 5}),
    LoraSpec(rank=1, layers_to_transform=(1,), exclude_modules=["v_proj"], dropout=0.3),
    LoraSpec(rank=2, target_modules=["embed_tokens", "lm_head"], alpha=1),
]
ROWS = jnp.array([2, -1, 0, 4, 3, 1, 2], jnp.int32)


def made(spec, seed=0, params=PARAMS):
    return trained(init_adapters(jax.random.key(seed), params, spec), spec, seed=seed), spec


PARTS = [made(spec, i) for i, spec in enumerate(SPECS)]


@functools.cache
def bank_of_all():
    return make_bank(PARAMS, PARTS)


@functools.cache
def small_bank():
    return make_bank(PARAMS, PARTS[:1], size=2)


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, x, positions=None, **kwargs):
    return model.apply(variables, x, *(() if positions is None else (positions,)), **kwargs)


def alone(part, x, model=MODEL, params=PARAMS, **kwargs):
    """The model with one adapter, or with none."""
    if part is None:
        return run(model, {"params": params}, x, **kwargs)
    return run(adapted(model, part[1]), {"params": params, "lora": part[0]}, x, **kwargs)


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(1, float(jnp.abs(expected).max())))


def test_each_row_is_as_if_alone():
    x = tokens(B=len(ROWS))
    got = run(banked(MODEL), {"params": PARAMS, "bank": bank_of_all(), "rows": ROWS}, x)
    for i, row in enumerate(ROWS.tolist()):
        expected = alone(None if row < 0 else PARTS[row], x[i : i + 1])[0]
        assert_close(got[i], expected)
    plain = alone(None, x)
    assert float(jnp.abs(got - plain).max(axis=(1, 2))[jnp.array([0, 2, 3, 4, 5])].min()) > 1e-2, "adapters act"


def test_swapping_compiles_nothing():
    bank, x = make_bank(PARAMS, PARTS[:3], size=4, rank=4), tokens(B=3)
    apply = jax.jit(chex.assert_max_traces(banked(MODEL).apply, n=1))
    chex.clear_trace_counter()
    for i, (index, spec) in enumerate([(3, SPECS[0]), (1, SPECS[3]), (0, LoraSpec(rank=4, scaling="rslora"))]):
        part = made(spec, seed=10 + i)
        bank = replace_adapter(bank, index, *part)
        got = apply({"params": PARAMS, "bank": bank, "rows": jnp.array([index, -1, 2])}, x)
        for j, one in enumerate((part, None, PARTS[2])):
            expected = alone(one, x[j : j + 1])[0]
            assert_close(got[j], expected)


def test_the_base_is_multiplied_once_for_all_rows():
    """No kernel of the base gets a row axis: each product with one takes all rows at once."""
    variables = {"params": PARAMS, "bank": bank_of_all(), "rows": ROWS[:5]}
    found = list(products(jax.make_jaxpr(banked(MODEL).apply)(variables, tokens(B=5)).jaxpr))
    down = PARAMS["model"]["layers"]["mlp"]["down_proj"]["kernel"].shape[1:]
    assert ((5, 1, 7, 24), down) in found and ((5, 1, 7, 24), (5, 24, bank_of_all().spec.rank)) in found
    assert not any(shape[-2:] == down and len(shape) > 2 for pair in found for shape in pair)


def products(jaxpr):
    """The shapes of both operands of every matrix product."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(v.aval.shape for v in equation.invars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)  # of a remat it is open
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_positions_segments_and_chosen_tokens_go_with_their_rows():
    x, rows = tokens(B=3), jnp.array([1, -1, 2])
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 3]])
    segments, at = jnp.cumsum(positions == 0, axis=1), jnp.array([[6], [2], [0]])
    variables = {"params": PARAMS, "bank": bank_of_all(), "rows": rows}
    got = run(banked(MODEL), variables, x, positions=positions, segment_ids=segments, logit_positions=at)
    for i, part in enumerate((PARTS[1], None)):
        own = slice(i, i + 1)
        expected = alone(part, x[own], positions=positions[own], segment_ids=segments[own], logit_positions=at[own])[0]
        assert_close(got[i], expected)


def test_a_cache_goes_with_its_rows():
    from stablelora_jax.models.cache import empty_cache

    x, variables = tokens(B=3), {"params": PARAMS, "bank": bank_of_all(), "rows": jnp.array([1, -1, 2])}
    apply = jax.jit(banked(MODEL).apply)
    whole = apply(variables, x)
    cache, pieces = empty_cache(MODEL.config, 3, 9, jnp.float32), []
    positions = jnp.broadcast_to(jnp.arange(7), (3, 7))
    for own in (slice(0, 4), slice(4, 5), slice(5, 7)):
        logits, cache = apply(variables, x[:, own], positions[:, own], cache=cache)
        pieces.append(logits)
    assert_close(jnp.concatenate(pieces, 1), whole)
    assert cache.k.shape[1] == 3 and int(cache.used) == 7


def test_generation():
    from stablelora_jax.generation.decode import generate_tokens

    prompts, mask = tokens(B=2, T=5), jnp.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    variables = {"params": PARAMS, "bank": bank_of_all(), "rows": jnp.array([-1, 2])}
    got, _ = generate_tokens(banked(MODEL), variables, prompts, mask, max_new_tokens=6)
    model, own = adapted(MODEL, PARTS[2][1]), {"params": PARAMS, "lora": PARTS[2][0]}
    expected, _ = generate_tokens(model, own, prompts, mask, max_new_tokens=6)
    plain, _ = generate_tokens(MODEL, {"params": PARAMS}, prompts, mask, max_new_tokens=6)
    assert (got[0] == plain[0]).all() and (got[1] == expected[1]).all() and (plain != expected).any(axis=1).all()


@pytest.mark.parametrize("name", ["scan_layers", "conv_einsum"])
def test_any_linen_model(name):
    module, shape, spec = FOREIGN[name]
    params = random_params(module, jnp.zeros(shape))
    parts = [made(spec, i, params) for i in range(2)]
    x = jax.random.normal(jax.random.key(0), (3, *shape[1:]))
    bank = make_bank(params, parts)
    got = run(banked(module), {"params": params, "bank": bank, "rows": jnp.array([1, -1, 0])}, x)
    for i, part in enumerate((parts[1], None, parts[0])):
        np.testing.assert_allclose(got[i], alone(part, x[i : i + 1], module, params)[0], atol=1e-5)


def test_numbers_that_are_not_taken_are_the_base():
    bank, x = make_bank(PARAMS, PARTS[:1], size=3), tokens(B=2)
    assert bank.size == 3
    got = run(banked(MODEL), {"params": PARAMS, "bank": bank, "rows": jnp.array([1, 2])}, x)
    np.testing.assert_allclose(got, alone(None, x), atol=1e-5)


def test_rows_outside_the_bank_are_nan_where_they_are_traced():
    x, rows = tokens(B=len(ROWS)), jnp.array([5, -2, 99, 4, 0, 0, 0])
    got = run(banked(MODEL), {"params": PARAMS, "bank": bank_of_all(), "rows": rows}, x)
    assert jnp.isnan(got[:3]).all() and jnp.isfinite(got[3:]).all()


def applied(B=2, **changes):
    variables = {"params": PARAMS, "bank": bank_of_all(), "rows": jnp.array([0, 1]), **changes}
    return banked(MODEL).apply({k: v for k, v in variables.items() if v is not None}, tokens(B=B))


DORA = LoraSpec(rank=2, parametrization="dora")
BAD = {
    "outside": (lambda: applied(rows=jnp.array([0, 5])), "row 5 is outside the bank of 5 adapters: 0 to 4, -1 for the"),
    "negative": (lambda: applied(rows=np.array([-2, 0])), "row -2 is outside the bank"),
    "floats": (lambda: applied(rows=jnp.array([0.0, 1.0])), r"rows must be whole numbers.* not float32 \(2,\)"),
    "count": (lambda: applied(B=3), r"one for each row of the batch, not int32 \(2,\)"),
    "no_bank": (lambda: applied(bank=None), 'the variables lack "bank"'),
    "no_rows": (lambda: applied(rows=None), 'the variables lack "rows"'),
    "rngs": (
        lambda: banked(MODEL).apply(
            {"params": PARAMS, "bank": bank_of_all(), "rows": ROWS}, tokens(B=7), rngs={"dropout": jax.random.key(0)}
        ),
        "without dropout: leave out rngs",
    ),
    "empty": (lambda: make_bank(PARAMS, []), "there are no adapters"),
    "size": (lambda: make_bank(PARAMS, PARTS, size=2), "size=2 has no room for 5 adapters"),
    "rank": (lambda: make_bank(PARAMS, PARTS, rank=2), "adapter 1: model.layers.self_attn.v_proj has lora_a"),
    "dora": (lambda: make_bank(PARAMS, [(PARTS[0][0], DORA)]), "adapter 0 is dora and cannot be taken together"),
    "base": (
        lambda: make_bank(tiny_decoder(hidden_size=32)[1], PARTS),
        "adapter 0: model.layers.self_attn.q_proj: the kernel is",
    ),
    "index": (
        lambda: replace_adapter(bank_of_all(), 5, *PARTS[0]),
        "no adapter 5 in a bank of 5: numbers go from 0 to 4",
    ),
    "swap_rank": (
        lambda: replace_adapter(small_bank(), 0, *made(LoraSpec(rank=3))),
        r"q_proj has lora_a \(3, 16, 3\); the bank has room for \(3, 16, 2\)",
    ),
    "swap_target": (
        lambda: replace_adapter(small_bank(), 0, *PARTS[1]),
        "the new adapter adapts model.layers.mlp.down_proj, which the bank does not",
    ),
    "swap_dora": (lambda: replace_adapter(small_bank(), 0, PARTS[0][0], DORA), "the new adapter is dora"),
    "swap_model": (
        lambda: replace_adapter(small_bank(), 0, *made(SPECS[0], params=tiny_decoder(hidden_size=8)[1])),
        "the new adapter: model.layers.self_attn.q_proj has lora_a",
    ),
    "swap_stacked": (
        lambda: replace_adapter(small_bank(), 0, PARTS[0][0], LoraSpec(rank=2, stacked=("layers", "blocks"))),
        "the new adapter has stacked",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_are_named(fault):
    make, message = BAD[fault]
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
