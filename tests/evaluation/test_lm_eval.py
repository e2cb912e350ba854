"""Beside lm-evaluation-harness itself: a slice of ``experiments/compare_harness.py``, and our model in the harness."""

import importlib.util
import re

import jax
import pytest

from stablelora_jax import LoraSpec, init_adapters, load_pretrained, save_peft
from tests.conftest import ROOT
from tests.helpers import trained

pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")

TEXTS = ("", "One day a big dog ran.", "The end.\n\n" + "Once upon a time there was a cat. " * 60)
NAMES = ("arc_easy", "arc_challenge", "openbookqa", "social_i_qa", "hellaswag")


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("LMEVAL_LOG_LEVEL", "ERROR")
        spec = importlib.util.spec_from_file_location("compare_harness", ROOT / "experiments" / "compare_harness.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def stories():
    path = ROOT.parent / "shared" / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip("stories260K of ../shared is not here")
    return str(path)


@pytest.fixture(scope="module")
def adapter(stories, tmp_path_factory):
    _, params = load_pretrained(stories)
    spec = LoraSpec(rank=4, target_modules=["q_proj", "v_proj"])
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec, size=0.1)
    directory = tmp_path_factory.mktemp("adapter") / "peft"
    save_peft(directory, adapters, spec, base_model=stories)
    return str(directory)


class Request:
    def __init__(self, *args):
        self.args, self.task_name = args, None


def requests(*all_args):
    return [Request(*args) for args in all_args]


@pytest.fixture(scope="module")
def models(compare, stories, adapter):
    from stablelora_jax.evaluation.lm_eval import StableLoraLM

    pytest.importorskip("peft")
    return StableLoraLM(stories, adapter, batch_size=8), compare.harness_model(stories, adapter, 1)


@pytest.mark.long
def test_the_paper_s_sets_row_by_row(compare, stories, shared):
    lines = compare.compare(stories, shared("data"), dict.fromkeys(NAMES, 20))
    for line in lines:
        assert line["rows"] == 20 and line["different"] == []
        assert 0 < line["largest"] < 2e-4


@pytest.mark.long
def test_generations(compare, stories, shared):
    (line,) = compare.compare(stories, shared("data"), {"gsm8k": 3}, batch_size=1)
    assert line["rows"] == 3 and line["different"] == []


def test_differences_are_seen(compare):
    from stablelora_jax.evaluation.tasks import TaskResult

    row = {"index": 0, "loglikelihoods": [-1.0, -2.0], "target": 0, "acc": 1.0}
    ours = TaskResult([row], {"acc": 1.0, "acc_stderr": None})
    means = {"acc,none": 1.0, "acc_stderr,none": "N/A"}
    assert compare.difference("arc_easy", ours, [dict(row)], means)["different"] == []
    other = {**row, "acc": 0.0, "loglikelihoods": [-1.0, -2.5]}
    found = compare.difference("arc_easy", ours, [other], {**means, "acc,none": 0.0})
    assert found["different"] == [(0, "acc", 1.0, 0.0), ("acc", 1.0, 0.0)] and found["largest"] == 0.5
    assert compare.difference("arc_easy", ours, [], means)["different"] == [("rows", 1, 0)]


def test_likelihoods_with_an_adapter(models):
    pairs = [
        ("One day", " a dog ran"),
        ("One day ", "a dog"),
        ("", "The end"),
        ("<s>One", " day"),
        (TEXTS[2], " The end."),
    ]
    ours, theirs = (model.loglikelihood(requests(*pairs), disable_tqdm=True) for model in models)
    for (a, same), (b, expected) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and same == expected


def test_rolling(models):
    ours, theirs = (
        model.loglikelihood_rolling(requests(*((text,) for text in TEXTS)), disable_tqdm=True) for model in models
    )
    assert len(models[0].tok_encode(TEXTS[2])) > models[0].max_length
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


def test_generate_until(models):
    asked = [
        ("One day, a little girl", {"until": ["."], "do_sample": False, "max_gen_toks": 20}),
        ("Tim and Sue", {"until": ["."], "do_sample": False, "max_gen_toks": 20}),
        (TEXTS[2], {"until": ["\n", "dog"], "max_gen_toks": 8}),
        ("The cat", {"until": "said", "temperature": 0.0, "max_gen_toks": 12}),
    ]
    ours, theirs = (model.generate_until(requests(*asked), disable_tqdm=True) for model in models)
    assert ours == theirs and all(ours) and "." not in ours[0]


def test_a_task_of_the_harness_on_our_model(models, compare, shared):
    rows, means = compare.harness_rows(models[0], "arc_easy", shared("data"), 5)
    theirs, expected = compare.harness_rows(models[1], "arc_easy", shared("data"), 5)
    assert [row["acc_norm"] for row in rows] == [row["acc_norm"] for row in theirs]
    assert means["acc,none"] == expected["acc,none"]


def test_nothing_else_needs_the_harness():
    files = sorted((ROOT / "stablelora_jax").rglob("*.py"))
    naming = [path.name for path in files if re.search(r"^\s*(import|from) lm_eval", path.read_text(), re.MULTILINE)]
    assert naming == ["lm_eval.py"]
