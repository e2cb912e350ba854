"""experiments/bench.py on shapes so small that only its tables are looked at."""

import importlib.util

import pytest

from stablelora_jax import InputError
from stablelora_jax.optimizer_config import OPTIMIZERS
from tests.conftest import ROOT


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench", ROOT / "experiments" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "bench", module)
    spec.loader.exec_module(module)
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    monkeypatch.setattr(module, "QWEN2_05B", small)
    monkeypatch.setattr(module, "LLAMA_15M", small)
    return module


def test_tables_hold_a_row_for_each_optimizer_asked_for(bench):
    asked = ("stable_lora", "lora_fa", "stable_lora, all latches off")
    lines = bench.measure(bench.BenchConfig(repeats=2, step_repeats=2, steps=1, rows=1, length=4, only=asked))
    tables = "\n".join(lines).split("### ")[1:]
    assert len(tables) == 3
    for table in tables:
        assert all(f"| {row} |" in table for row in asked) and "lora_rite" not in table
    more = {line.split("|")[1].strip(): line.split("|")[5] for line in tables[2].splitlines() if line.count("|") == 6}
    assert int(more["stable_lora"]) == 2 * 7  # one byte a pair


def test_every_optimizer_can_be_measured_and_others_are_refused(bench):
    assert set(OPTIMIZERS) - {"adamw"} <= set(bench.ROWS)
    with pytest.raises(InputError, match="'nope' is none of"):
        bench.BenchConfig(only=("nope",))
    with pytest.raises(InputError, match="there is no folder no/such"):
        bench.BenchConfig(output="no/such/table.md")
