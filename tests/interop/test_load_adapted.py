"""Base and adapter from files, and experiments/evaluate.py around them."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, base_directory, init_adapters, load_pretrained, save_peft
from stablelora_jax.interop.load_adapted import load_adapted_model
from tests.conftest import ROOT
from tests.data.tasks.test_arc import OURS
from tests.data.tasks.test_arc import write as write_rows
from tests.helpers import trained

BASE = str(base_directory())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    _, params = load_pretrained(BASE)
    spec = LoraSpec(rank=4)
    directory = tmp_path_factory.mktemp("adapter") / "peft"
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    save_peft(directory, adapters, spec, base_model=BASE)
    return directory


def test_load_adapted_model(adapter):
    tokens = jnp.arange(8)[None]
    logits = []
    for arguments in (
        {},
        {"adapter": adapter},
        {"adapter": adapter, "merged": True},
        {"adapter": adapter, "untie": True},
    ):
        model, variables = load_adapted_model(BASE, **arguments)
        logits.append(np.asarray(model.apply(variables, tokens)))
        assert ("lora" in variables) == (arguments.get("adapter") is not None and "merged" not in arguments)
    base, beside, merged, untied = logits
    assert np.abs(base - beside).max() > 1e-2
    np.testing.assert_allclose(merged, beside, atol=1e-4 * max(1, np.abs(beside).max()))
    np.testing.assert_allclose(untied, beside, atol=1e-4 * max(1, np.abs(beside).max()))
    assert "lm_head" in variables["params"], "untied"
    model, variables = load_adapted_model(BASE, adapter, dtype=jnp.bfloat16, merged=True)
    assert model.dtype == variables["params"]["model"]["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    with pytest.raises(InputError, match="no/where"):
        load_adapted_model("no/where", adapter)  # the base that is given, not the one that the adapter names
    with pytest.raises(InputError, match="merged needs an adapter"):
        load_adapted_model(BASE, merged=True)
    with pytest.raises(InputError, match="neither a run directory"):
        load_adapted_model(BASE, adapter.parent)


@pytest.fixture
def command(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("evaluate_command", ROOT / "experiments" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        code = module.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_the_command(command, adapter, tmp_path):
    (tmp_path / "arc_easy").mkdir()
    write_rows(tmp_path / "arc_easy", [OURS] * 3, "validation.jsonl")
    out = tmp_path / "out"
    given = (BASE, "--adapter", adapter, "--tasks", "arc_easy", "--data", tmp_path, "--limit", 2, "--output", out)
    code, said, wrong = command(*given)
    assert code == 0 and wrong == ""
    assert [line.split()[3] for line in said.splitlines()] == ["metric", "acc", "acc_norm"]
    rows = [json.loads(line) for line in (out / "arc_easy.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1] and rows[0]["loglikelihoods"] == rows[1]["loglikelihoods"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["adapter"] == str(adapter) and summary["tasks"]["arc_easy"]["rows"] == 2
    assert summary["tasks"]["arc_easy"]["acc_stderr"] == 0.0
    code, said, wrong = command(*given)
    assert code == 2 and said == "" and wrong == f"error: {out} exists already: remove it or choose another --output\n"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--tasks", "arc_esay"], "no task 'arc_esay'; the tasks are hellaswag"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "text"], "the task text has no place on the hub"),
        (
            ["--tasks", "arc_easy", "--data", "no/where"],
            "no/where/arc_easy does not exist; a directory with validation.jsonl",
        ),
        (["--tasks", "arc_easy", "--merged"], "--merged needs --adapter"),
        (["--tasks", "arc_easy", "--adapter", "no/where"], "neither a run directory"),
        (["--tasks", "arc_easy", "--batch-size", "0"], "batch_size must be positive"),
    ],
)
def test_mistakes_are_one_line(command, arguments, message):
    code, said, wrong = command(BASE, *arguments)
    assert code == 2 and said == "" and message in wrong and wrong.count("\n") == 1
