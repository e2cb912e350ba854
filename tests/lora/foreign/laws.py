"""Laws of adapters on any JAX model; a model is one :class:`Row`, and every law takes a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stablelora_jax import LoraSpec, adapted, load_peft, save_peft, stable_lora
from tests.helpers import exact_jit, jit, largest_difference

VARIANTS = {
    "lora": {},
    "rslora": {"scaling": "rslora"},
    "dora": {"parametrization": "dora"},
}  # changes of a row's spec under which apply equals merge


@dataclass(frozen=True)
class Row:
    """A model, and what its author expects of its adapters.

    ``base(params, *args)`` is the model without adapters, and gives a tree of arrays; ``model`` is what ``adapted``
    takes. ``shapes`` maps the dotted name of each pair to the shapes of ``lora_a`` and ``lora_b``.
    """

    model: Any
    base: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    spec: LoraSpec
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    others: Mapping[str, Any] = field(default_factory=dict)  # collections beside params and lora
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # of apply and init; ``base`` has its own
    tolerance: float = 1e-5  # relative to the largest value
    batched: tuple[int, ...] = (0,)  # which args have the batch as their first axis, of a multiple of 8 rows

    def lora(self, **changes: Any) -> Any:
        """The adapted model, with ``changes`` to the spec."""
        return adapted(self.model, replace(self.spec, **changes))

    def fresh(self, **changes: Any) -> Any:
        """Adapters as ``init`` makes them."""
        return self.lora(**changes).init(jax.random.key(3), self.params, *self.args, **self.kwargs)

    def run(self, lora: Any, params: Any, adapters: Any, *args: Any) -> Any:
        """The output of the adapted model."""
        return lora.apply({"params": params, "lora": adapters, **self.others}, *args, **self.kwargs)


def adapters_are_as_expected(row: Row) -> None:
    """Names and shapes of all pairs."""
    found = {".".join(path): (pair["lora_a"].shape, pair["lora_b"].shape) for path, pair in pairs(row.fresh()).items()}
    assert found == dict(row.shapes)


def apply_is_merge(row: Row, variant: str) -> None:
    """The adapted model equals the base with merged parameters, in values and in gradients to the adapters."""
    lora = row.lora(**VARIANTS[variant])
    adapters = perturbed(row.fresh(**VARIANTS[variant]))

    def low_rank(adapters):
        return row.run(lora, row.params, adapters, *row.args)

    def merged(adapters):
        return row.base(lora.merge(row.params, adapters), *row.args)

    found, found_gradient = jit(partial(value_and_gradient, low_rank))(adapters)
    expected, expected_gradient = jit(partial(value_and_gradient, merged))(adapters)
    assert relative_difference(found, expected) < row.tolerance
    assert relative_difference(found_gradient, expected_gradient) < row.tolerance
    base = jit(row.base)(row.params, *row.args)
    assert relative_difference(found, base) > 1e-3, "the adapters change nothing"
    shapes = jax.eval_shape(lambda adapters: lora.merge(row.params, adapters), adapters)
    assert jax.tree.structure(shapes) == jax.tree.structure(row.params)


def fresh_adapters_change_nothing(row: Row) -> None:
    """With B = 0 the output is the base's, to the bit."""
    lora, adapters = row.lora(), row.fresh()
    found = exact_jit(partial(row.run, lora))(row.params, adapters, *row.args)
    expected = exact_jit(row.base)(row.params, *row.args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def training_lowers_the_loss(row: Row, steps: int = 20) -> None:
    """Steps of Stable-LoRA under one jit: one compilation, a lower loss, the same base."""
    lora, adapters, before = row.lora(), row.fresh(), jax.tree.map(np.array, row.params)
    optimizer = stable_lora(1e-2, shrink_ratio=5e-3)

    def loss(adapters, params, args):
        outputs = jax.tree.leaves(row.run(lora, params, adapters, *args))
        return sum(jnp.mean(jnp.square(y - 0.3)) for y in outputs if jnp.issubdtype(y.dtype, jnp.floating))

    @jit
    def step(adapters, state, params, args):
        value, gradient = jax.value_and_grad(loss)(adapters, params, args)
        updates, state = optimizer.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimizer.init(adapters), []
    for _ in range(steps):
        adapters, state, value = step(adapters, state, row.params, row.args)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1
    assert relative_difference(row.params, before) == 0


def stacked_is_separate(
    stacked: Row, separate: Row, split: Callable[[Any], Any], split_params: Callable[[Any], Any] | None = None
) -> None:
    """A scanned model equals its unrolled twin; ``split`` makes the twin's tree of the scanned model's.

    It is applied to the adapters, and to the base's parameters if ``split_params`` is not given.
    """
    adapters = perturbed(stacked.fresh())
    twin, params = split(adapters), (split_params or split)(stacked.params)
    assert jax.tree.map(jnp.shape, twin) == jax.tree.map(jnp.shape, separate.fresh())
    found = jit(partial(stacked.run, stacked.lora()))(stacked.params, adapters, *stacked.args)
    expected = jit(partial(separate.run, separate.lora()))(params, twin, *stacked.args)
    assert relative_difference(found, expected) < stacked.tolerance


def devices_change_nothing(row: Row) -> None:
    """The batch over 8 devices, base and adapters on each: the numbers of one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((), ("data",)))
    lora, adapters = row.lora(), perturbed(row.fresh())
    split = tuple(jax.device_put(x, rows if i in row.batched else whole) for i, x in enumerate(row.args))

    def gradient(params, adapters, *args):
        return value_and_gradient(lambda adapters: row.run(lora, params, adapters, *args), adapters)

    compiled = jit(gradient)
    found = compiled(*jax.device_put((row.params, adapters), whole), *split)
    expected = compiled(row.params, adapters, *row.args)
    assert relative_difference(found, expected) < row.tolerance


def peft_round_trip(row: Row, directory: Any) -> None:
    """Adapters saved as PEFT's come back the same, with the same spec."""
    adapters = perturbed(row.fresh())
    save_peft(directory, adapters, row.spec, params=row.params)
    loaded, spec = load_peft(directory, row.params)
    assert spec == row.spec
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    assert largest_difference(loaded, adapters) == 0


def pairs(adapters: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every dict with ``lora_a`` by its path; keys are strings."""
    if "lora_a" in adapters:
        return {path: adapters}
    found: dict[tuple[str, ...], Any] = {}
    for key, node in adapters.items():
        assert isinstance(key, str)
        found |= pairs(node, (*path, key))
    return found


def perturbed(adapters: Any, seed: int = 5, size: float = 0.3) -> Any:
    """``adapters`` with a random B: the low-rank path matters."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = jnp.asarray((rng.normal(size=leaf.shape) * size).astype(leaf.dtype))  # NumPy compiles nothing
        # A of a look-up table starts with zeros
        zero = path[-1].key in ("lora_a", "lora_b") and not np.asarray(leaf).any()
        return noise if path[-1].key == "lora_b" or zero else leaf

    return jax.tree_util.tree_map_with_path(draw, adapters)


def value_and_gradient(function: Callable[[Any], Any], adapters: Any) -> tuple[Any, Any]:
    """``function``'s output, and the gradient of a fixed weighted sum of it to ``adapters``."""

    def loss(adapters):
        y = function(adapters)
        floats = [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        weights = [jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape) for leaf in floats]
        return sum(jnp.sum(leaf * weight) for leaf, weight in zip(floats, weights, strict=True)), y

    gradient, y = jax.grad(loss, has_aux=True)(adapters)
    return y, gradient


def relative_difference(a: Any, b: Any) -> float:
    """The greatest |a - b| over the leaves of two trees, relative to the greatest |b| of all leaves."""
    both = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    difference = max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in both)
    return difference / max(float(np.abs(np.asarray(y)).max()) for _, y in both)
