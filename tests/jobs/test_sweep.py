"""A grid: points by name, no point twice, means over seeds, and what is best."""

import json
import math
from dataclasses import replace

import pytest

from stablelora_jax import InputError
from stablelora_jax.cli.main import main
from stablelora_jax.config.run import RunConfig
from stablelora_jax.jobs.rounds import Rounds
from stablelora_jax.jobs.sweep import Point, groups, load_sweep
from stablelora_jax.jobs.sweep_table import best_rates, markdown, rows

TEXT = """
output: OUT
at_once: 4
common:
  {steps: 3, batch_size: 8, evaluate: false, trackers: [], schedule: {warmup_steps: 1}, task: {train_limit: 50},
   lora: {rank: 2}}
grid:
  optimizer: [adamw, {name: stable_lora, shrink_ratio: 1e-2}]
  optimizer.learning_rate: [1e-3, 1e-2]
  seed: [0, 1]
"""


def write(tmp_path, text=TEXT):
    path = tmp_path / "sweep.yaml"
    path.write_text(text.replace("OUT", str(tmp_path / "out")))
    return path


def test_points(tmp_path):
    _, points = load_sweep(write(tmp_path), ["steps=5"])
    names = list(points)
    assert len(names) == 8 and names[0] == "adamw,learning_rate=0.001,seed=0"
    assert names[-1] == "stable_lora+shrink_ratio=0.01,learning_rate=0.01,seed=1"
    first, last = points[names[0]].config, points[names[-1]].config
    assert (first.optimizer.name, first.optimizer.learning_rate, first.seed, first.steps) == ("adamw", 1e-3, 0, 5)
    assert (last.optimizer.shrink_ratio, last.optimizer.learning_rate, last.seed) == (1e-2, 1e-2, 1)
    other = {
        **points,
        "x": points[names[0]]._replace(config=replace(first, lora=replace(first.lora, parametrization="dora"))),
    }
    assert [len(own) for own in groups(other)] == [8, 1]


MISTAKES = {
    "{grid: {}}": "grid has 0 points",
    "{grid: {seed: []}}": r"grid\.seed is empty",
    "{grid: {seed: [1, 1]}}": "two points of the grid are called seed=1",
    "{grid: {lora.rnk: [4]}}": r"rnk=4: lora\.rnk=4: lora\.rnk is not a key \(did you mean lora\.rank\?\)",
    "{grid: {optimizer: [adamv]}}": "adamv",
    "{grid: {seed: 3}}": "grid",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(tmp_path, text):
    with pytest.raises(InputError, match=MISTAKES[text]) as error:
        load_sweep(write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_a_killed_sweep_goes_on_and_no_point_is_repeated(tmp_path, monkeypatch, capsys):
    path, steps, real = write(tmp_path), [], Rounds.step

    class Killed(BaseException):
        pass

    def step(self, numbers, save):
        if len(steps) == 4:
            raise Killed  # four points have ended, four are under way
        steps.append(len(numbers))
        return real(self, numbers, save)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Rounds, "step", step)
        main(["sweep", str(path)])
    capsys.readouterr()
    monkeypatch.setattr(
        Rounds, "step", lambda self, numbers, save: steps.append(len(numbers)) or real(self, numbers, save)
    )
    assert main(["sweep", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count(" is finished") == 4 and sum(steps) - 4 == 8 * 3  # four points repeat the step that was not saved
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metric"] == "loss_last_10" and len(results["points"]) == 4 and len(results["best"]) == 2
    for row in results["points"]:
        summaries = [json.loads((tmp_path / "out" / name / "summary.json").read_text()) for name in row["runs"]]
        assert row["mean"] == pytest.approx(sum(s["loss_last_10"] for s in summaries) / 2) and row["std"] > 0
    assert (tmp_path / "out" / "results.md").read_text().split("-->\n")[1] in said
    count = len(steps)
    more = write(tmp_path, TEXT.replace("[1e-3, 1e-2]", "[1e-3, 1e-2, 1e+30]").replace("[0, 1]", "[0]"))
    assert main(["sweep", str(more), "max_consecutive_errors=2", "max_grad_norm=null"]) == 2  # another configuration
    assert len(steps) == count
    assert main(["sweep", str(more)]) == 0  # clipped, so it does not fail
    assert sum(steps[count:]) == 2 * 3


def test_results_of_somebody_else_are_kept(tmp_path, capsys):
    path = write(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.md").write_text("mine")
    assert main(["sweep", str(path)]) == 2
    assert "results.md was not made by a sweep: move it" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.md"]


def test_means_and_the_best():
    config = RunConfig(steps=2000)
    values = {0.1: (3.0, 5.0), 0.2: (2.0, 2.5), 0.4: (4.0, None)}
    points, summaries = {}, {}
    for rate, losses in values.items():
        for seed, loss in enumerate(losses):
            name = f"learning_rate={rate},seed={seed}"
            points[name] = Point({"optimizer.learning_rate": rate, "seed": seed}, config)
            summaries[name] = {"after": {"loss": loss, "acc": 0.5}}
    table = rows(points, summaries, {})
    assert [row["mean"] for row in table[:2]] == [4.0, 2.25] and math.isnan(table[2]["mean"])
    assert table[0]["std"] == pytest.approx(2**0.5) and table[2]["std"] is None
    (best,) = best_rates(table, "loss")
    assert best["values"]["optimizer.learning_rate"] == 0.2 and not best["edge"]
    (best,) = best_rates(table[1:], "loss")
    assert best["edge"] and "at the edge of the grid" in markdown(table[1:], "loss")
    (best,) = best_rates(table, "acc")
    assert best["values"]["optimizer.learning_rate"] == 0.1
