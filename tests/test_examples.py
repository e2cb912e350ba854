"""The scripts in ``examples/`` run, and do what they say; those that compile much are marked long."""

import re
import runpy
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def example(monkeypatch, capsys):
    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        space = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return space, capsys.readouterr().out

    return run


@pytest.mark.long
def test_own_loop(example):
    space, out = example("own_loop", "--steps", 50)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < 0.5 and space["right"] >= 24 and "modules still shrink" in out


def test_foreign_linen_model(example):
    space, out = example("foreign_linen_model", "--steps", 60)
    assert float(space["loss"]) < 0.1 and "attention.query" in out and "accuracy 1.00" in out
    assert abs(space["merged"] - space["logits"]).max() < 1e-3


@pytest.mark.long
def test_own_jsonl(example, tmp_path):
    _, out = example("own_jsonl", "--directory", tmp_path)
    assert out.splitlines()[-2:] == [" In the cave.", " In the hive."]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_qlora(example):
    space, out = example("qlora", "--steps", 20)
    first, last = (float(x) for x in re.findall(r"loss ([\d.]+)", out))
    assert last < first and space["kernel_bytes"](space["params"]) < space["kernel_bytes"](space["full"]) / 7


@pytest.mark.long
def test_many_adapters(example):
    space, out = example("many_adapters")
    pets, wild, base, rank = out.splitlines()
    assert (pets, wild, rank) == (" is a pet.", " is wild.", "the mixture has rank 12") and "wild" not in base


@pytest.mark.long
def test_resume_after_kill(example, tmp_path):
    assert (
        "records equal: True, adapters equal in every bit: True"
        in example("resume_after_kill", "--steps", 20, "--directory", tmp_path)[1]
    )


def test_every_example_has_a_test():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals() if name.removeprefix("test_") in names}
