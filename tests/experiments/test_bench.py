"""experiments/bench.py: its front, and its tables of optimizers on shapes so small that only these are looked at."""

import sys

import pytest

from stablelora_jax import InputError
from stablelora_jax.config.optimizer import OPTIMIZERS
from tests.conftest import ROOT


@pytest.fixture
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")


@pytest.fixture
def optimizers(experiments, monkeypatch):
    from bench import optimizers as bench_optimizers

    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    small |= dict(num_key_value_heads=2, vocab_size=32)
    shapes = {name: {**bench_optimizers.SHAPES[name], **small} for name in ("qwen2-0.5b", "llama-15m")}
    monkeypatch.setattr(bench_optimizers, "SHAPES", shapes)
    return bench_optimizers


@pytest.mark.long
def test_tables_hold_a_row_for_each_optimizer_asked_for(optimizers):
    asked = ("stable_lora", "lora_fa", "stable_lora, all latches off")
    lines = optimizers.measure(optimizers.BenchConfig(repeats=2, step_repeats=2, steps=1, rows=1, length=4, only=asked))
    tables = "\n".join(lines).split("### ")[1:]
    assert len(tables) == 3
    for table in tables:
        assert all(f"| {row} |" in table for row in asked) and "lora_rite" not in table
    more = {line.split("|")[1].strip(): line.split("|")[5] for line in tables[2].splitlines() if line.count("|") == 6}
    assert int(more["stable_lora"]) == 2 * 7  # one byte a pair


def test_every_optimizer_can_be_measured_and_others_are_refused(optimizers):
    assert set(OPTIMIZERS) - {"adamw"} <= set(optimizers.ROWS)
    with pytest.raises(InputError, match="'nope' is not one of"):
        optimizers.BenchConfig(only=("nope",))
    with pytest.raises(InputError, match="directory no/such does not exist"):
        optimizers.BenchConfig(output="no/such/table.md")


BAD = {
    "": "arguments are required: command",
    "nope": "invalid choice: 'nope'",
    "optimizers repeats=0": "repeats must be at least 1",
    "train --shape nope": "invalid choice: 'nope'",
    "train --batch x": "invalid int value: 'x'",
    "train --attention nope": "invalid choice: 'nope'",
    "train --ran 4": "unrecognized arguments: --ran 4",
    "train --steps 0": "--steps must be at least 1, not 0",
    "train --length 9000": "--length 9000 exceeds the model's maximum of 8192",
    "train --loss-fraction 1.5": "--loss-fraction must leave at least one loss token and be at most 1, not 1.5",
    "train --loss-fraction 0.001": "--loss-fraction must leave at least one loss token",
    "train --documents 200": "--length 256 is less than two tokens for each of 200 documents",
    "train --devices 0": "--devices must be at least 1, not 0",
    "train --batch 3 --devices 2": "--batch 3 cannot be divided evenly over --devices 2",
    "train --peak-flops 0": "--peak-flops must be positive",
    "train --peer nope": "--peer takes peft, tunix, or both, comma-separated, not nope",
    "train --peer peft,nope": "--peer takes peft, tunix, or both, comma-separated, not peft,nope",
    "train --peer tunix,tunix": "--peer takes peft, tunix, or both, comma-separated, not tunix,tunix",
    "train --peer-python python3": "--peer-python needs --peer\n",
    "train --peer peft --peer-python tunix=python3": "--peer-python needs --peer tunix\n",
    "train --peer tunix --peer-python no/such": "--peer-python no/such: no such program",
    "train --peer tunix --peer-python tunix=no/such": "--peer-python no/such: no such program",
    "train --peer tunix --peer-modes eager": "--peer-modes needs --peer peft\n",
    "train --peer peft --peer-modes fast": "--peer-modes takes eager, compile, or both, comma-separated, not fast",
    "curves": "arguments are required: --output",
    "curves --output no/such/place": "directory no/such does not exist",
    "curves --output place --rounds 0": "--rounds must be at least 1",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_arguments_are_one_line_and_exit_code_2(experiments, monkeypatch, capsys, tmp_path, line):
    from bench import front as bench

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", *line.split()])
    try:
        code = bench.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and not list(tmp_path.iterdir())
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and BAD[line] in said.err


def test_each_command_has_its_help(experiments, monkeypatch, capsys):
    from bench import front as bench

    for what in bench.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["bench.py", what, "--help"])
        with pytest.raises(SystemExit, match="0"):
            bench.main()
        assert f"usage: bench.py {what}" in capsys.readouterr().out
