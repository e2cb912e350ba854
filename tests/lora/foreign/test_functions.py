"""The laws of adapters for plain functions."""

from __future__ import annotations

import pytest

from tests.helpers import long, soak
from tests.lora.foreign import laws
from tests.lora.foreign.function_rows import NO_DORA, ROWS

QUICK = ("matmul", "vmapped", "by_scan", "by_fori_loop", "haiku", "conditional", "equinox_attention")
NO_BATCH = ("kernel_first", "hessian")


def cases(quick=QUICK, without=(), rest=long):
    return pytest.mark.parametrize("name", [n if n in quick else rest(n) for n in ROWS if n not in without])


@pytest.mark.parametrize("name", ROWS)
def test_adapters_are_as_expected(name):
    laws.adapters_are_as_expected(ROWS[name]())


VARIANTS = [("lora", name) if name in QUICK else long("lora", name) for name in ROWS]
VARIANTS += [("dora", name) if name in QUICK[:3] else long("dora", name) for name in ROWS if name not in NO_DORA]
VARIANTS += [soak("rslora", name) for name in QUICK]


@pytest.mark.parametrize(("variant", "name"), VARIANTS)
def test_apply_is_merge(variant, name):
    laws.apply_is_merge(ROWS[name](), variant)


@cases()
def test_fresh_adapters_change_nothing(name):
    laws.fresh_adapters_change_nothing(ROWS[name]())


@cases(("by_fori_loop", "haiku"), ("sharded",), soak)  # whose adapters are on 8 devices after the first step
def test_training_lowers_the_loss(name):
    laws.training_lowers_the_loss(ROWS[name]())


@cases(("by_scan", "equinox_mlp"), NO_BATCH, soak)
def test_devices_change_nothing(name):
    laws.devices_change_nothing(ROWS[name]())


@cases()
def test_peft_round_trip(name, tmp_path):
    laws.peft_round_trip(ROWS[name](), tmp_path)
