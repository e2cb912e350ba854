"""A search: trials are a function of file and results, none is asked for twice, and the best is on top."""

import json
import math
import sys

import pytest

from stablelora_jax import InputError
from stablelora_jax.cli.main import main
from stablelora_jax.config.run import RunConfig
from stablelora_jax.jobs import search as module
from stablelora_jax.jobs.search import run_search
from stablelora_jax.jobs.space import Search, ask, axes_of, corners, values_of
from stablelora_jax.jobs.sweep import Point, load_sweep, point_maker
from stablelora_jax.jobs.sweep_table import markdown, ranked, rows

TEXT = """
output: OUT
at_once: 4
common:
  {steps: 2, batch_size: 8, evaluate: false, trackers: [], schedule: {warmup_steps: 1}, task: {train_limit: 50},
   lora: {rank: 2}}
search: {trials: 10, seed: 0, startup: 4}
space:
  optimizer.learning_rate: {low: 1e-4, high: 1e-1, log: true}
  lora.rank: {low: 2, high: 8, step: 2}
  optimizer: {choices: [adamw, {name: stable_lora, shrink_ratio: 1e-3}]}
"""


def load(tmp_path, text=TEXT):
    path = tmp_path / "search.yaml"
    path.write_text(text.replace("OUT", str(tmp_path / "out")))
    sweep, points = load_sweep(path)
    assert not points
    return sweep, point_maker(path, sweep)


def loss(values):
    """Least for a learning rate of 1e-2, a high rank, and Stable-LoRA."""
    off = math.log10(values["optimizer.learning_rate"]) + 2
    return off**2 + (8 - values["lora.rank"]) / 20 + (values["optimizer"] == "adamw")


@pytest.fixture
def cheap(monkeypatch):
    """Points have their losses at once, and are remembered; those of ``fails`` fail, and ``kill`` kills."""

    class Calls(list):
        fails, kill, finished = set(), None, {}

    class Killed(BaseException):
        pass

    calls = Calls()
    calls.Killed = Killed

    def run(sweep, points, log_fn):
        for name, point in points.items():
            if name == calls.kill:
                raise Killed
            if name not in calls.finished and name not in calls.fails:
                value = loss(point.values) + 0.01 * point.values.get("seed", 0)
                calls.finished[name] = {"loss_last_10": value}
                calls.append((name, dict(point.values)))
        done = {name: calls.finished[name] for name in points if name in calls.finished}
        return done, {name: "why" for name in points if name not in done}

    calls.finished = {}
    calls.fails = set()
    monkeypatch.setattr(module, "run_sweep", run)
    return calls


def test_without_optuna(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    load(tmp_path)
    assert main(["sweep", str(tmp_path / "search.yaml")]) == 2
    assert capsys.readouterr().err == 'error: search: it needs Optuna: pip install "stablelora-jax[optuna]"\n'
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "{search: {trials: 3}}": "a search has the keys search and space",
    "{space: {seed: {low: 0, high: 3}}}": "a search has the keys search and space",
    "{search: {}, space: {seed: {low: 0, high: 3}}, grid: {seed: [1]}}": "name one of them",
    "{search: {trails: 3}, space: {}}": r"search\.trails is not a key \(did you mean search\.trials\?\)",
    "{search: {trials: 0}, space: {}}": r"search\.trials must be at least 1",
    "{search: {}, space: {lora.rank: {lo: 3}}}": r"space\.lora\.rank: .*lo is not a key",
    "{search: {}, space: {lora.rank: {low: 3}}}": r"space\.lora\.rank: name low and high, or choices",
    "{search: {}, space: {lora.rank: {low: 3, high: 3}}}": r"space\.lora\.rank: low must be below high",
    "{search: {}, space: {seed: {low: 0, high: 3, log: true}}}": r"space\.seed: with log, low must be above 0",
    "{search: {}, space: {lora.rank: {low: 1, high: 3, step: 0}}}": r"space\.lora\.rank: step must be above 0",
    "{search: {}, space: {lora.rank: {low: 1, high: 3, choices: [1]}}}": "choices stand alone",
    "{search: {}, space: {lora.rnk: {low: 1, high: 3}}}": r"lora\.rnk is not a key",
    "{search: {}, space: {lora.rank: {low: 0, high: 3}}}": r"lora\.rank",
    "{search: {}, space: {optimizer: {choices: [adamw, adamv]}}}": "adamv",
    "{search: {seeds: [1]}, space: {seed: {low: 0, high: 3}}}": r"space\.seed and search\.seeds exclude each other",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(tmp_path, text):
    pytest.importorskip("optuna")
    with pytest.raises(InputError, match=MISTAKES[text]) as error:
        run_search(*load(tmp_path, text[:-1] + ", output: OUT}"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_is_drawn():
    pytest.importorskip("optuna")
    space = {
        "a": {"low": 1e-4, "high": 1.0, "log": True},
        "b": {"low": 2, "high": 9, "step": 3},
        "c": {"low": 0.0, "high": 1.0, "step": 0.3},
        "d": {"choices": [{"name": "x"}, None, 3]},
    }
    axes = axes_of(space)
    drawn = ask(axes, Search(startup=1), [(corners(axes)[0], 1.0)], 60, True)
    values = [values_of(axes, own) for own in drawn]
    assert {own["b"] for own in values} == {2, 5, 8} and all(isinstance(own["b"], int) for own in values)
    assert {own["c"] for own in values} == {0, 0.3, 0.6, 0.9}
    assert all(own["d"] in space["d"]["choices"] for own in values) and {repr(own["d"]) for own in values} >= {"None"}
    assert all(1e-4 <= own["a"] <= 1 for own in values) and len({own["a"] for own in values}) == 60
    assert ask(axes, Search(seed=1), [], 3, True) == ask(axes, Search(seed=1), [], 3, True)
    assert ask(axes, Search(seed=1), [], 3, True) != ask(axes, Search(seed=2), [], 3, True)


@pytest.mark.parametrize("minimize", [True, False])
def test_it_learns_from_results_and_not_from_failures(minimize):
    pytest.importorskip("optuna")
    axes, told, sign = axes_of({"x": {"low": -1.0, "high": 1.0}}), [], 1 if minimize else -1
    for _ in range(15):
        new = ask(axes, Search(startup=8), told, 4, minimize)
        told += [(own, math.nan if own["x"] > 0.8 else sign * (own["x"] - 0.5) ** 2) for own in new]
    later = [own["x"] for own, _ in told[12:]]
    near = sum(abs(x - 0.5) < 0.25 for x in later)
    assert near > len(later) * 0.35  # of draws at random, 0.25
    assert sum(x > 0.8 for x in later) < len(later) * 0.15  # where failures are forgotten, 0.5


def test_a_killed_search_asks_for_nothing_twice(tmp_path, cheap, monkeypatch):
    """The same trials with and without kills, also with other ``at_once`` afterwards; more trials may be added."""
    pytest.importorskip("optuna")
    sweep, make = load(tmp_path)
    points, done, failed = run_search(sweep, make)
    whole = [(name, dict(point.values)) for name, point in points.items()]
    assert len(whole) == 10 and cheap == whole and not failed and whole[0][0] == "trial-0000"
    cheap.clear()
    cheap.finished = {}
    (tmp_path / "other").mkdir()
    sweep, make = load(tmp_path / "other")
    for cheap.kill in ("trial-0005", "trial-0009"):
        with pytest.raises(cheap.Killed):
            run_search(sweep, make)
    cheap.kill = None
    again, _, _ = run_search(sweep, make)
    assert [(name, dict(point.values)) for name, point in again.items()] == whole == cheap
    asked = []
    monkeypatch.setattr(module, "ask", lambda *given: asked.append(given[3]) or ask(*given))
    more = load(tmp_path / "other", TEXT.replace("trials: 10", "trials: 13").replace("at_once: 4", "at_once: 2"))
    points, _, _ = run_search(*more)
    assert len(points) == 13 and asked == [2, 1] and len(cheap) == 13
    with pytest.raises(InputError, match="of a search with another space: choose another output"):
        run_search(*load(tmp_path / "other", TEXT.replace("1e-1", "1e-2")))
    with pytest.raises(InputError, match="of a search with another search: choose another output"):
        run_search(*load(tmp_path / "other", TEXT.replace("seed: 0", "seed: 1")))


def test_seeds_and_failures(tmp_path, cheap, monkeypatch):
    """The sampler is told the mean over seeds, and that a trial has failed where one of its runs has."""
    pytest.importorskip("optuna")
    cheap.fails = {"trial-0001,seed=3"}
    told = []
    monkeypatch.setattr(module, "ask", lambda *given: told.append(given[2]) or ask(*given))
    text = TEXT.replace("startup: 4", "startup: 4, seeds: [0, 3]").replace("trials: 10", "trials: 4")
    points, done, failed = run_search(*load(tmp_path, text))
    assert list(points)[:3] == ["trial-0000,seed=0", "trial-0000,seed=3", "trial-0001,seed=0"] and len(points) == 8
    assert list(failed) == ["trial-0001,seed=3"] and points["trial-0000,seed=3"].config.seed == 3
    assert [len(own) for own in told] == [0, 2]  # two trials of two seeds fill the slots
    first, second = (value for _, value in told[1])
    assert first == pytest.approx(loss(points["trial-0000,seed=0"].values) + 0.015) and math.isnan(second)
    table = ranked(rows(points, done, failed), "loss_last_10")
    means = [row["mean"] for row in table]
    assert means[:3] == sorted(means[:3]) and math.isnan(means[3])
    lines = markdown(table, "loss_last_10", rates=False).splitlines()
    assert len(lines) == 4 + 4 and lines[-1].startswith("| trial=1, ") and "(1 failed)" in lines[-1]


def test_high_values_of_an_accuracy_are_on_top():
    points = {f"trial-{i}": Point({"trial": i}, RunConfig()) for i in range(3)}
    summaries = {f"trial-{i}": {"after": {"acc": value}} for i, value in enumerate((0.2, 0.9, 0.4))}
    table = [{"values": {"trial": i}, "mean": summaries[name]["after"]["acc"]} for i, name in enumerate(points)]
    assert [row["values"]["trial"] for row in ranked(table, "acc")] == [1, 2, 0]
    assert [row["values"]["trial"] for row in ranked(table, "loss")] == [0, 2, 1]


@pytest.mark.long
def test_the_command(tmp_path, capsys):
    pytest.importorskip("optuna")
    text = (
        TEXT.replace("trials: 10", "trials: 4").replace("startup: 4", "startup: 2").replace("at_once: 4", "at_once: 2")
    )
    load(tmp_path, text)
    assert main(["sweep", str(tmp_path / "search.yaml")]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    means = [row["mean"] for row in results["points"]]
    assert len(means) == 4 and means == sorted(means) and results["best"] == results["points"][:1]
    assert "best learning rate" not in said and "| trial=" in said
    before = (tmp_path / "out" / "trials.json").read_bytes()
    assert main(["sweep", str(tmp_path / "search.yaml")]) == 0
    assert capsys.readouterr().out.count(" is finished") == 4
    assert (tmp_path / "out" / "trials.json").read_bytes() == before
    assert json.loads((tmp_path / "out" / "results.json").read_text())["points"] == results["points"]
