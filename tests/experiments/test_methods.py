"""experiments/methods.py: the table over all methods, which goes on where it was killed."""

import importlib.util
import json

import pytest

from stablelora_jax.utils.errors import RunError
from tests.conftest import ROOT

SMALL = ["steps=2", "batch_size=8", "schedule.warmup_steps=1", "task={train_limit: 16, validation_limit: 8}"]
COSTS = {"trainable": 10, "state_bytes": 2**20, "temporary_bytes": 0, "milliseconds": 1.0, "relative_time": 1.25}


@pytest.fixture
def module():
    path = ROOT / "experiments" / "methods.py"
    spec = importlib.util.spec_from_file_location("methods", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_it_goes_on_where_it_was_killed(module, monkeypatch, tmp_path):
    """With runs that cost nothing; a run that fails does not end the others."""
    asked, rest, measured = [], iter([KeyboardInterrupt(), 0.25, RunError("not finite")]), []

    def run(config, log_fn):
        asked.append((config.lora.parametrization, config.seed))
        value = {("lora", 0): 0.5, ("lora", 1): 0.7}.get(asked[-1]) or next(rest)
        if not isinstance(value, float):
            raise value
        return {"after": {"acc": value}}

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "prepare", lambda *given: None)
    monkeypatch.setattr(module, "timer", lambda setup: None)
    monkeypatch.setattr(module, "costs", lambda *given: measured.append(given) or COSTS)
    command = ["--output", str(tmp_path), "--seeds", "2", "--methods", "lora,miss", "batch_size=16"]
    assert module.main(command) == 130
    assert asked == [("lora", 0), ("lora", 1), ("miss", 0)] and len(measured) == 1
    assert module.main(command) == 0
    assert len(measured) == 2 and asked[-2:] == [("miss", 0), ("miss", 1)]
    lines = (tmp_path / "methods.md").read_text().splitlines()
    assert lines[2] == "| `lora` | 10 | 60.0 ± 14.1 | 1.25 | 1.00 MiB | 0.00 MiB |"
    assert lines[3] == "| `miss` | 10 | 25.0 (1 failed) | 1.25 | 1.00 MiB | 0.00 MiB |"
    found = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert found["lora"]["accuracies"] == [0.5, 0.7] and found["miss"]["failed"] == {"1": "not finite"}


def test_what_cannot_be_measured(module, tmp_path, capsys):
    for words, said in ((["--methods", "lorra"], "there is no method lorra"), (["--seeds", "0"], "--seeds must be")):
        assert module.main(["--output", str(tmp_path), *words]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.long
def test_two_methods(module, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "ROUNDS", 1)
    command = ["--output", str(tmp_path), "--seeds", "1", "--methods", "lora_fa,miss", *SMALL]
    assert module.main(command) == 0
    found = json.loads((tmp_path / "methods.json").read_text())["methods"]
    miss = 3 * 8 * (96 + 48 + 48 + 96 + 288 + 288 + 96)  # r times the outputs
    lora_fa = 3 * 8 * (96 + 48 + 48 + 96 + 288 + 288 + 96)  # B alone
    assert (found["miss"]["trainable"], found["lora_fa"]["trainable"]) == (miss, lora_fa)
    assert all(own["temporary_bytes"] > 0 and own["relative_time"] > 0 for own in found.values())
    assert found["miss"]["state_bytes"] >= 3 * 4 * miss and 0 <= found["miss"]["mean"] <= 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/*.json*")}
    assert module.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/*.json*")} == before
