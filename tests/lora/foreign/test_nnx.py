"""The laws of adapters for NNX models."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from tests.helpers import long, soak
from tests.lora.foreign import laws
from tests.lora.foreign.nnx_models import Unrolled
from tests.lora.foreign.nnx_rows import ROWS, scanned, unrolled

QUICK = ("linear", "conv", "einsum_joined", "gru", "qwen3", "llama", "scanned")  # the others are long


def cases(quick=QUICK, rest=long):
    return pytest.mark.parametrize("name", [name if name in quick else rest(name) for name in ROWS])


@pytest.mark.parametrize("name", ROWS)
def test_adapters_are_as_expected(name):
    laws.adapters_are_as_expected(ROWS[name]())


VARIANTS = [("lora", name) if name in QUICK else long("lora", name) for name in ROWS]
VARIANTS += [("dora", name) if name in ("conv", "scanned") else long("dora", name) for name in ROWS]
VARIANTS += [soak("rslora", name) for name in QUICK]


@pytest.mark.parametrize(("variant", "name"), VARIANTS)
def test_apply_is_merge(variant, name):
    laws.apply_is_merge(ROWS[name](), variant)


@cases()
def test_fresh_adapters_change_nothing(name):
    laws.fresh_adapters_change_nothing(ROWS[name]())


@cases(("llama", "scanned"), soak)
def test_training_lowers_the_loss(name):
    laws.training_lowers_the_loss(ROWS[name]())


@cases(("scanned",), soak)
def test_devices_change_nothing(name):
    laws.devices_change_nothing(ROWS[name]())


@cases()
def test_peft_round_trip(name, tmp_path):
    laws.peft_round_trip(ROWS[name](), tmp_path)


def split(tree):
    """Parameters or adapters of :class:`Scanned` as those of :class:`Unrolled`."""
    plain = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    key = int if isinstance(tree, nnx.State) else str
    layers = {key(i): jax.tree.map(lambda leaf, i=i: leaf[i], plain["layers"]) for i in range(3)}
    plain = {**plain, "layers": layers}
    if not isinstance(tree, nnx.State):
        return plain
    state = nnx.state(Unrolled(rngs=nnx.Rngs(1)), nnx.Param)
    nnx.replace_by_pure_dict(state, plain)
    return state


def test_stacked_is_separate():
    laws.stacked_is_separate(scanned(), unrolled(), split)
