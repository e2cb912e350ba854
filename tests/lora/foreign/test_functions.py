"""Adapters on plain functions: dicts, Haiku's names, every form of a loop, Equinox; and what is refused, and how."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted
from tests.helpers import jit, long
from tests.lora.foreign import equinox_models, laws
from tests.lora.foreign import function_models as models
from tests.lora.foreign.laws import Row, perturbed, relative_difference

R = 2


def pair(size, out, *stack):
    """The shapes of a pair."""
    return (*stack, size, R), (*stack, R, out)


def row(built, shapes, targets="all-linear", tolerance=1e-5, batched=(0,), **spec):
    """The row of ``(fn, params, args)``."""
    fn, params, args = built
    spec = LoraSpec(target_modules=targets, rank=R, alpha=3, **spec)
    return Row(fn, fn, params, args, spec, shapes, tolerance=tolerance, batched=batched)


LAYER = {"qkv": (8, 24), "out": (8, 8), "up": (8, 12), "down": (12, 8)}
DECODER = {f"layers.{name}": pair(*size, 3) for name, size in LAYER.items()}


def product(name):
    """One product, in one of the ways that people write it; a bare vector as input has no batch."""
    *built, size, out = models.dense_rows()[name]
    return row(built, {"w": pair(size, out)}, tolerance=2e-2 if name == "rounded" else 1e-5)  # of bfloat16


def decoder(name):
    """All the decoder's matrices: whatever the loop, a pair for each layer."""
    return row(models.transformer(models.LOOPS[name]), DECODER, tolerance=1e-4)


def decoder_with_tables():
    """The look-up table and the head, by name; ``embed`` and ``unembed`` are bare leaves."""
    shapes = {"embed": pair(11, 8), "unembed": pair(8, 11), "layers.up": pair(8, 12, 3)}
    return row(models.transformer(models.by_scan), shapes, ["embed", "unembed", "up"], tolerance=1e-4)


def haiku():
    shapes = {"net/~/mlp/~/linear_0": pair(8, 12), "net/~/mlp/~/linear_1": pair(12, 8)}
    return row(models.haiku_like(), shapes)


def haiku_table():
    """Haiku's tables are called ``embeddings``, which is a leaf's own name."""
    return row(models.haiku_like(), {"net/~/embed.embeddings": pair(11, 8)}, ["embeddings"])


def conditional():
    shapes = dict.fromkeys(("shared", "yes", "no"), pair(8, 8))
    return row(models.conditional(), shapes)


def force():
    return row(models.force(), {"a": pair(8, 12), "b": pair(12, 1)}, tolerance=1e-4)


def tied():
    return row(models.tied(), {"table": pair(11, 8), "fc": pair(8, 8)}, ["table", "fc"])


ROWS = {name: partial(product, name) for name in models.dense_rows()}
ROWS |= {name: partial(decoder, name) for name in models.LOOPS}
ROWS |= {f.__name__: f for f in (decoder_with_tables, haiku, haiku_table, conditional, force, tied)}
ROWS |= {f"equinox_{name}": partial(equinox_models.row, name) for name in equinox_models.NAMES}
QUICK = ("matmul", "vmapped", "by_scan", "by_fori_loop", "haiku", "conditional", "equinox_attention")
NO_BATCH = ("kernel_first",)


def cases(quick=QUICK, without=()):
    return pytest.mark.parametrize("name", [n if n in quick else long(n) for n in ROWS if n not in without])


@pytest.mark.parametrize("name", ROWS)
def test_adapters_are_as_expected(name):
    laws.adapters_are_as_expected(ROWS[name]())


VARIANTS = [("lora", name) for name in ROWS]
VARIANTS += [("dora", name) if name in QUICK else long("dora", name) for name in ROWS]
VARIANTS += [long("rslora", name) for name in QUICK]


@pytest.mark.parametrize(("variant", "name"), VARIANTS)
def test_apply_is_merge(variant, name):
    laws.apply_is_merge(ROWS[name](), variant)


@cases()
def test_fresh_adapters_change_nothing(name):
    laws.fresh_adapters_change_nothing(ROWS[name]())


@cases(("by_fori_loop", "haiku"))
def test_training_lowers_the_loss(name):
    laws.training_lowers_the_loss(ROWS[name]())


@cases(("by_scan", "equinox_mlp"), NO_BATCH)
def test_devices_change_nothing(name):
    laws.devices_change_nothing(ROWS[name]())


@pytest.mark.parametrize("name", ROWS)
def test_peft_round_trip(name, tmp_path):
    laws.peft_round_trip(ROWS[name](), tmp_path)


def test_every_loop_is_the_same():
    """One stack of adapters gives the same numbers, whatever the loop over the layers."""
    rows = {name: decoder(name) for name in models.LOOPS}
    rows["by_while_loop"] = row(models.transformer(models.by_while_loop), DECODER)
    first = rows["by_scan"]
    adapters = perturbed(first.fresh())
    outputs = {name: jit(partial(r.run, r.lora()))(r.params, adapters, *r.args) for name, r in rows.items()}
    for name, y in outputs.items():
        assert relative_difference(y, outputs["by_scan"]) < 1e-5, name
        assert jax.tree.map(jnp.shape, rows[name].fresh()) == jax.tree.map(jnp.shape, adapters), name


def test_scan_in_reverse():
    laws.apply_is_merge(row(models.transformer(models.by_scan_reversed), DECODER, tolerance=1e-4), "lora")


@pytest.mark.parametrize("flag", [True, False])
def test_both_branches(flag):
    """Only the branch that is taken changes the output; the adapters of both are found."""
    found = conditional()
    x = found.args[0]
    adapters = perturbed(found.fresh())
    y, merged = (found.run(found.lora(), found.params, adapters, x, flag), found.lora().merge(found.params, adapters))
    assert relative_difference(y, found.base(merged, x, flag)) < 1e-5
    unused = "no" if flag else "yes"
    changed = {**adapters, unused: jax.tree.map(jnp.zeros_like, adapters[unused])}
    assert relative_difference(found.run(found.lora(), found.params, changed, x, flag), y) == 0


def test_several_outputs():
    """The structure of the output is the model's; keyword arguments reach it."""
    fn, params, args = models.several_outputs()
    lora = adapted(fn, LoraSpec(target_modules="all-linear", rank=R))
    adapters = perturbed(lora.init(jax.random.key(0), params, *args, scale=2.0))
    y = jax.jit(lambda a: lora.apply({"params": params, "lora": a}, *args, scale=2.0))(adapters)
    want = fn(lora.merge(params, adapters), *args, scale=2.0)
    assert jax.tree.structure(y) == jax.tree.structure(want)
    assert relative_difference(y, want) < 1e-5
    assert y["none"] is None and y["pair"][1] == args[0].sum()


def test_shapes_are_enough():
    """``init`` takes ``ShapeDtypeStruct`` for the base and for the arguments."""
    found = decoder("by_scan")
    shapes = jax.eval_shape(lambda *x: x, found.params, *found.args)
    fresh = found.lora().init(jax.random.key(3), *shapes)
    assert relative_difference(fresh, found.fresh()) == 0


def test_transforms_of_apply():
    """``vmap`` over adapters, ``jvp`` and ``jacfwd`` go through as through any function."""
    found = product("matmul")
    lora, adapters = found.lora(), perturbed(found.fresh())
    run = lambda a: found.run(lora, found.params, a, *found.args)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapters)
    both = jax.vmap(run)(two)
    assert relative_difference(both[1], run(jax.tree.map(lambda x: 2 * x, adapters))) < 1e-5
    out, tangent = jax.jvp(run, (adapters,), (adapters,))
    base = found.base(found.params, *found.args)
    assert relative_difference(tangent, 2 * (out - base)) < 1e-5


def test_a_jitted_function_is_traced_once():
    """Twenty calls of the adapted model under one jit trace the user's function as often as one call."""
    fn, params, args = models.haiku_like()
    count = []

    def counted(params, tokens):
        count.append(1)
        return fn(params, tokens)

    lora = adapted(counted, LoraSpec(target_modules="all-linear", rank=R))
    adapters = lora.init(jax.random.key(0), params, *args)
    step = jax.jit(lambda a, *args: lora.apply({"params": params, "lora": a}, *args))
    step(adapters, *args)
    traces = len(count)
    for _ in range(20):
        step(adapters, *args)
    assert len(count) == traces


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
    lora, params, args = refused(name, ["a", "b"], merged=("b",))
    adapters = perturbed(lora.init(jax.random.key(0), params, *args))
    assert laws.pairs(adapters).keys() == {("a",), ("b",)}
    fn = models.refused()[name][0]
    found = jit(partial(laws.value_and_gradient, lambda a: lora.apply({"params": params, "lora": a}, *args)))(adapters)
    want = jit(partial(laws.value_and_gradient, lambda a: fn(lora.merge(params, a), *args)))(adapters)
    assert relative_difference(found, want) < 1e-5


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


@pytest.mark.parametrize("targets", [["nothing"], ["w", "nothing"], r"no\.such", ["norm"]])
def test_pattern_that_matches_nothing(targets):
    """A misspelt entry, alone or beside a good one, an expression, and a leaf that is only scaled by."""
    fn, params, args = models.transformer(models.by_scan)
    params = {**params, "w": params["unembed"]}
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
        (lambda a: {}, "linear_0"),
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
            lora.merge(found.params, adapters)
    assert "\n" not in str(error.value)


def test_errors_of_the_model_are_its_own():
    """A mistake in the user's function keeps its type and message."""
    fn = lambda p, x: x @ p["w"]["kernel"] @ p["w"]["missing"]
    with pytest.raises(KeyError, match="missing"):
        adapted(fn, LoraSpec(target_modules=["w"])).init(jax.random.key(0), {"w": {"kernel": jnp.eye(4)}}, jnp.eye(4))


def test_dropout_of_the_model_and_of_the_adapter():
    """Without keys nothing is dropped; with them the low-rank path is, and the base is as it was."""
    found = product("matmul")
    lora = found.lora(dropout=0.5)
    adapters = perturbed(lora.init(jax.random.key(0), found.params, *found.args))
    variables = {"params": found.params, "lora": adapters}
    run = lambda rngs: np.asarray(lora.apply(variables, *found.args, rngs=rngs))
    keys = [{"dropout": jax.random.key(i)} for i in (1, 1, 2)]
    one, same, other = map(run, keys)
    assert (one == same).all() and (one != other).any() and (one != run(None)).any()
    nothing = jax.tree.map(jnp.zeros_like, adapters)
    dropped = lora.apply({"params": found.params, "lora": nothing}, *found.args, rngs=keys[0])
    assert relative_difference(dropped, found.base(found.params, *found.args)) < 1e-6
