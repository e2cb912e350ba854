"""What no pair can follow, on plain functions: refused in one line that names the leaf and the way out; that way."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from stablelora_jax import InputError, LoraSpec, adapted
from tests.helpers import jit
from tests.lora.foreign import function_models as models
from tests.lora.foreign import laws
from tests.lora.foreign.function_rows import NO_DORA, ROWS, R, haiku
from tests.lora.foreign.laws import perturbed, relative_difference
from tests.lora.foreign.product_models import X


def refused(name, targets="all-linear", merged=()):
    fn, params, args = models.refused()[name]
    lora = adapted(fn, LoraSpec(target_modules=targets, rank=R), merged=merged)
    return lora, params, args


READ = ("custom_jvp", "squared", "normalised", "added", "joined", "returned", "product_of_two", "never_read")


@pytest.mark.parametrize("name", READ)
def test_refused_by_name(name):
    """A named leaf that no pair can follow: one line with the leaf and the way out."""
    lora, params, args = refused(name, ["a", "b"])
    with pytest.raises(
        InputError, match=r"\bb\b.*(merged|exclude)" if name != "product_of_two" else r"\b[ab]\b"
    ) as error:
        lora.init(jax.random.key(0), params, *args)
    assert "\n" not in str(error.value)
    if name == "custom_jvp":
        assert "custom_jvp" in str(error.value)


@pytest.mark.parametrize("name", READ)
def test_describe_says_why(name):
    """``describe`` raises nothing and has a line for each leaf, and on the second why it has no pair."""
    lora, params, args = refused(name)
    lines = str(lora.describe(params, *args)).splitlines()
    assert any("a" in line.split() for line in lines) and any("b" in line.split() for line in lines)


@pytest.mark.parametrize("name", [name for name in READ if name != "never_read"])
def test_merged_inside_apply(name):
    """With ``merged`` any operation may read the leaf: apply equals merge, in values and gradients."""
    lora, params, args = refused(name, ["a", "b"], merged=("a", "b") if name == "product_of_two" else ("b",))
    adapters = perturbed(lora.init(jax.random.key(0), params, *args))
    assert laws.pairs(adapters).keys() == {("a",), ("b",)}
    fn = models.refused()[name][0]
    found = jit(partial(laws.value_and_gradient, lambda a: lora.apply({"params": params, "lora": a}, *args)))(adapters)
    want = jit(partial(laws.value_and_gradient, lambda a: fn(lora.merge(params, a), *args)))(adapters)
    assert relative_difference(found, want) < 1e-5


def test_grouped_convolution():
    """Refused by name; merged, it has a pair over the channels of a group."""
    params, x = {"conv": {"kernel": models.normal(1, 3, 2, 6)}}, models.normal(2, 8, 7, 4)
    numbers = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": 2}
    fn = lambda p, x: jax.lax.conv_general_dilated(x, p["conv"]["kernel"], (1,), "SAME", **numbers)
    spec = LoraSpec(target_modules=["conv"], rank=R, in_axes={"conv": (0, 1)})
    with pytest.raises(InputError, match="conv .*grouped.*merged"):
        adapted(fn, spec).init(jax.random.key(0), params, x)
    lora = adapted(fn, spec, merged=("conv",))
    adapters = perturbed(lora.init(jax.random.key(0), params, x))
    assert adapters["conv"]["lora_a"].shape == (6, R) and adapters["conv"]["lora_b"].shape == (R, 6)
    y = lora.apply({"params": params, "lora": adapters}, x)
    assert relative_difference(y, fn(lora.merge(params, adapters), x)) < 1e-5


def test_own_gradient():
    """A product with a ``custom_vjp`` is refused by name; merged, it keeps its own gradient."""
    params, x = {"a": {"kernel": models.normal(1, 8, 6)}}, models.normal(2, 8, 8)
    fn = lambda p, x: models.own_matmul(x, p["a"]["kernel"])
    spec = LoraSpec(target_modules=["a"], rank=R)
    with pytest.raises(InputError, match=r"\ba\b.*custom_vjp"):
        adapted(fn, spec).init(jax.random.key(0), params, x)
    lora = adapted(fn, spec, merged=("a",))
    adapters = perturbed(lora.init(jax.random.key(0), params, x))
    found = jax.grad(lambda a: lora.apply({"params": params, "lora": a}, x).sum())(adapters)
    assert relative_difference(found, jax.grad(lambda a: fn(lora.merge(params, a), x).sum())(adapters)) < 1e-5


@pytest.mark.parametrize("targets", [["nothing"], ["up", "nothing"], r"no\.such", ["norm"]])
def test_pattern_that_matches_nothing(targets):
    """A misspelt entry, alone or beside a good one, an expression, and a leaf that is only scaled by."""
    fn, params, args = models.transformer(models.by_scan)
    with pytest.raises(InputError, match=r"nothing|such|norm") as error:
        adapted(fn, LoraSpec(target_modules=targets, rank=R)).init(jax.random.key(0), params, *args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda a: {**a, "other": a["net/~/mlp/~/linear_0"]}, "other"),
        (lambda a: {"net/~/mlp/~/linear_0": a["net/~/mlp/~/linear_0"]}, "linear_1"),
        (lambda a: {**a, "net/~/mlp/~/linear_1": a["net/~/mlp/~/linear_0"]}, "linear_1"),
        (lambda a: jax.tree.map(lambda x: jnp.concatenate([x, x], -1), a), r"linear_\d"),
        (lambda a: jax.tree.map(lambda x: x[None], a), r"linear_\d"),
        (lambda a: {}, "no pair"),
    ],
    ids=["more", "fewer", "shapes", "ranks", "stack", "none"],
)
@pytest.mark.parametrize("way", ["apply", "merge"])
def test_adapters_of_another_model(way, damage, words):
    """One line that names a pair."""
    found = haiku()
    lora, adapters = found.lora(), damage(found.fresh())
    with pytest.raises(InputError, match=words) as error:
        if way == "apply":
            found.run(lora, found.params, adapters, *found.args)
        else:
            found.lora().merge(found.params, adapters, *found.args)
    assert "\n" not in str(error.value)


def test_errors_of_the_model_are_its_own():
    """A mistake in the user's function keeps its type and message."""
    fn = lambda p, x: x @ p["w"]["kernel"] @ p["w"]["missing"]
    with pytest.raises(KeyError, match="missing"):
        adapted(fn, LoraSpec(target_modules=["w"])).init(jax.random.key(0), {"w": {"kernel": jnp.eye(4)}}, jnp.eye(4))


@pytest.mark.parametrize("name", NO_DORA)
def test_dora_is_refused_early(name):
    """Where DoRA's norms cannot be taken, ``init`` says so."""
    with pytest.raises(InputError, match=r"\bw\b"):
        ROWS[name]().fresh(parametrization="dora")


def test_bare_array():
    """Parameters without a name cannot be selected."""
    with pytest.raises(InputError, match="name"):
        adapted(lambda w, x: x @ w, LoraSpec(rank=R)).init(jax.random.key(0), jnp.ones((8, 8)), X)
