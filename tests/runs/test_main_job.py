"""The main job from three seeds: the base cannot do the task, the adapter can, and on animals it never trained on."""

import pytest

from stablelora_jax import config
from stablelora_jax.config.run import RunConfig
from stablelora_jax.data.tasks import compare_sizes
from stablelora_jax.runs.records import each_record
from stablelora_jax.runs.run import run
from tests.conftest import ROOT


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.soak)])
def test_the_main_job(seed, tmp_path):
    chosen = config.load(RunConfig, ROOT / "configs" / "default.yaml", [f"seed={seed}", f"output={tmp_path / 'r'}"])
    summary = run(chosen, lambda _: None)
    assert summary["before"]["questions"] == 400
    assert summary["before"]["acc"] <= 0.35 and summary["after"]["acc"] >= 0.9
    questions = compare_sizes.questions("validation")
    records = list(each_record(tmp_path / "r" / "metrics.jsonl"))
    (answers,) = [r["validation"]["answers"] for r in records if "validation" in r and r["step"]]
    new = [answer == q.label for answer, q in zip(answers, questions, strict=True) if "-new-" in q.id]
    assert len(new) >= 100 and sum(new) / len(new) >= 0.9
