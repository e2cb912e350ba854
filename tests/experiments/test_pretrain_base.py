"""The shipped base: what it is, and that its maker is deterministic."""

import importlib.util
import json

import pytest

from stablelora_jax import base_directory, load_pretrained
from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location("pretrain_base", ROOT / "experiments" / "pretrain_base.py")
maker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(maker)


def test_the_shipped_base_is_small_and_as_good_as_it_says():
    files = list(base_directory().iterdir())
    assert sum(file.stat().st_size for file in files) <= 4 * 2**20
    record = json.loads((base_directory() / "pretraining.json").read_text())
    model, params = load_pretrained(base_directory())
    assert model.config.model_type == "llama" and record["steps"] == maker.STEPS
    assert maker.held_out_loss(model, params, record["seed"]) == pytest.approx(record["held_out_loss"], rel=0.02)


def test_transformers_loads_it():
    torch = pytest.importorskip("torch")
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(base_directory(), dtype=torch.float32)
    model, params = load_pretrained(base_directory())
    ids = model.tokenizer(["The bear is bigger than the cat."]).input_ids
    expected = reference(torch.tensor(ids)).logits.detach().numpy()
    assert abs(model.apply({"params": params}, ids) - expected).max() < 1e-4 * abs(expected).max()


@pytest.mark.long
def test_pretraining_is_deterministic(tmp_path):
    """The same bytes twice in up to four attempts: on a busy machine XLA on a CPU now and then rounds otherwise.

    A seed that did not decide the result would give four different bases.
    """
    made = []
    for name in ("a", "b", "c", "d"):
        maker.make_base(tmp_path / name, seed=3, steps=4)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
        if made[-1] in made[:-1]:
            break
    assert sorted(made[0]) == sorted(path.name for path in base_directory().iterdir())
    assert made[-1] in made[:-1]
    others = [{name: data for name, data in one.items() if "model" not in name and "pre" not in name} for one in made]
    assert all(one == others[0] for one in others), "tokenizer and configurations never differ"


def test_training_and_held_out_text_differ_and_hold_no_question():
    from itertools import islice

    train, held_out = (list(islice(maker.texts(0, held_out=h), 2000)) for h in (False, True))
    assert not set(train) & set(held_out) and not any("?" in text for text in train + held_out)


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seed", "-1"], []])
def test_mistakes_end_in_one_line(arguments, tmp_path, capsys):
    if not arguments:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("mine")
        arguments = ["--output", str(tmp_path / "full")]
    else:
        arguments += ["--output", str(tmp_path / "new")]
    assert maker.main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()
