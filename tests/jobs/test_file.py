"""jobs.yaml: who wins, and mistakes in one line that names job and key."""

from pathlib import Path

import pytest

from stablelora_jax import InputError
from stablelora_jax.jobs.file import load_jobs, read_record


def write(tmp_path, text):
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    return path


def test_later_ones_win(tmp_path):
    (tmp_path / "base.yaml").write_text("{steps: 7, batch_size: 3, lora: {rank: 2, dropout: 0.1}, seed: 5}")
    text = f"""
output: {tmp_path / "out"}
config: {tmp_path / "base.yaml"}
common: {{batch_size: 4, lora: {{alpha: 9}}, optimizer: {{name: lora_rite}}}}
jobs:
  a: {{lora: {{rank: 6}}}}
  b: {{optimizer: {{name: adamw, learning_rate: 1.0e-3}}, seed: 1}}
"""
    jobs, found = load_jobs(write(tmp_path, text), ["seed=8"])
    a, b = found.values()
    assert list(found) == ["a", "b"] and jobs.at_once == 8
    assert (a.steps, a.batch_size, a.lora.rank, a.lora.alpha, a.lora.dropout) == (7, 4, 6, 9, 0.1)
    assert (a.optimizer.name, b.optimizer.name, b.optimizer.learning_rate) == ("lora_rite", "adamw", 1e-3)
    assert a.seed == b.seed == 8 and Path(a.output) == tmp_path / "out" / "a"


MISTAKES = {
    "{jobs: {}}": "jobs is empty: name at least one job",
    "{jobs: {a: {lora: {rnk: 4}}}}": r"jobs\.a: lora={rnk: 4}: lora\.rnk is not a key \(did you mean lora\.rank\?\)",
    "{jobs: {a: {output: x}}}": r"jobs\.a\.output: the run directory is runs/jobs/a",
    "{jobs: {../a: {}}}": "is no name of a directory",
    "{common: {stps: 3}, jobs: {a: {}}}": r"jobs\.a: stps=3: stps is not a key \(did you mean steps\?\)",
    "{at_once: 0, jobs: {a: {}}}": "at_once must be at least 1",
    "{job: {a: {}}}": r"job is not a key \(did you mean jobs\?\)",
    "{config: nowhere.yaml, jobs: {a: {}}}": "nowhere.yaml",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(tmp_path, text):
    with pytest.raises(InputError, match=MISTAKES[text]) as error:
        load_jobs(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_record_that_is_none(tmp_path):
    assert read_record(tmp_path).steps == {}
    (tmp_path / "jobs.json").write_text('{"mine": 3}')
    with pytest.raises(InputError, match="is no record of jobs: move it"):
        read_record(tmp_path)
