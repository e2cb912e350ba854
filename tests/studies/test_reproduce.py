"""The study of claims: which runs it makes, what it says of them, its pages, and how it goes on."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from scipy import stats

from stablelora_jax.cli import configs
from stablelora_jax.config import to_dict
from stablelora_jax.runs.records import plain
from stablelora_jax.studies import comparison, forgetting, reproduce, reproduce_page
from stablelora_jax.studies.preset import FOLDER, PRESETS, load_study
from stablelora_jax.studies.significance import difference, mean_std

TEXT = """
config: default
common: {steps: 4, batch_size: 8, max_length: 64, lora: {rank: 4, alpha: 8, target_modules: [q_proj]}, trackers: [],
         num_samples: 0, schedule: {warmup_steps: 1}, checkpoint_every: 1000}
tasks: {compare_sizes: {task: {train_limit: 64, validation_limit: 8}}}
methods:
  AdamW: {optimizer: {name: adamw}}
  LoRA+: {optimizer: {name: lora_plus}}
  Stable-LoRA: {optimizer: {name: stable_lora, shrink_ratio: 0.05}}
learning_rates: [0.01, 0.02]
widen: 2
rate_seeds: [0]
seeds: [0, 1]
shrink_ratios: [0, 0.05]
ranks: [2, 4]
overhead_steps: 1
overhead_rounds: 2
stability_every: 2
"""


def write(tmp_path, text=TEXT):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


def study_of(tmp_path, text=TEXT, **given):
    return load_study(str(write(tmp_path, text)), tmp_path / "out", [], None, configs.find)


class Fake:
    """In place of ``train_jobs``: a result for each configuration, and a record of what was asked for."""

    def __init__(self, accuracy):
        self.accuracy, self.trained = accuracy, []

    def __call__(self, jobs, points, log_fn):
        self.trained.append(list(points))
        failed = {name: "not finite" for name, own in points.items() if self.accuracy(own) is None}
        done = {n: {"after": {"acc": self.accuracy(own)}} for n, own in points.items() if n not in failed}
        return done, failed


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """``compare`` with accuracies from a function of the configuration: (rows by method, names of all runs)."""

    def call(accuracy, text=TEXT):
        fake = Fake(accuracy)
        monkeypatch.setattr(comparison, "train_jobs", fake)
        runs = comparison.Runs(study_of(tmp_path, text), lambda text: None)
        rows = {row["method"]: row for row in comparison.compare(runs)}
        return rows, [name for group in fake.trained for name in group], runs

    return call


def peak(at):
    """Accuracy by learning rate, with its peak at ``at``."""
    return lambda config: 1 - abs(math.log(config.optimizer.learning_rate / at)) / 10


def rates(row):
    return [one["rate"] for one in row["rates"]]


def test_a_grid_grows_until_the_best_rate_is_inside(compared):
    rows, names, _ = compared(peak(0.045))
    assert rates(rows["AdamW"]) == [0.01, 0.02, 0.04, 0.08]
    assert (rows["AdamW"]["rate"], rows["AdamW"]["edge"]) == (0.04, False)
    assert len(names) == len(set(names)) == 3 * (4 + 1)  # rates of one seed, and the other seed at the best


def test_a_grid_grows_downwards_and_not_without_end(compared):
    rows, _, _ = compared(peak(1e-9))
    assert rates(rows["AdamW"]) == [0.0025, 0.005, 0.01, 0.02]
    assert (rows["AdamW"]["rate"], rows["AdamW"]["edge"]) == (0.0025, True)


def test_a_grid_whose_best_rate_is_inside_stays(compared):
    rows, _, _ = compared(peak(0.02), TEXT.replace("[0.01, 0.02]", "[0.01, 0.02, 0.04]"))
    assert rates(rows["LoRA+"]) == [0.01, 0.02, 0.04] and not rows["LoRA+"]["edge"]


def test_a_rate_at_which_a_run_fails_is_not_the_best(compared):
    better = peak(0.09)
    rows, _, runs = compared(lambda own: None if own.optimizer.learning_rate > 0.03 else better(own))
    assert (rows["AdamW"]["rate"], rows["AdamW"]["edge"]) == (0.02, False)
    assert rates(rows["AdamW"]) == [0.01, 0.02, 0.04]
    assert rows["AdamW"]["rates"][-1]["mean"] is None and len(runs.failed) == 3


def test_seeds_that_choose_are_not_those_that_count(compared):
    """Seed 7 chooses; seeds 0 and 1, with another best rate, are the result."""
    text = TEXT.replace("rate_seeds: [0]", "rate_seeds: [7]").replace("widen: 2", "widen: 0")
    value = lambda own: peak(0.02 if own.seed == 7 else 0.01)(own) + own.seed / 100
    rows, names, _ = compared(value, text)
    row = rows["Stable-LoRA"]
    assert row["rate"] == 0.02
    assert [round(value, 3) for value in row["runs"].values()] == [
        round(1 - math.log(2) / 10 + s / 100, 3) for s in (0, 1)
    ]
    assert math.isclose(row["std"], np.std(list(row["runs"].values()), ddof=1))


def test_a_lower_loss_is_better(tmp_path, monkeypatch):
    loss = lambda jobs, points, log_fn: (
        {n: {"after": {"loss": abs(math.log(own.optimizer.learning_rate / 0.02))}} for n, own in points.items()},
        {},
    )
    monkeypatch.setattr(comparison, "train_jobs", loss)
    text = TEXT.replace("widen: 2", "widen: 2\nmetric: loss")
    rows = comparison.compare(comparison.Runs(study_of(tmp_path, text), lambda text: None))
    assert {row["rate"] for row in rows} == {0.02} and not any(row["edge"] for row in rows)


def test_shrink_ratios_and_ranks_share_the_runs_of_the_comparison(compared):
    rows, names, runs = compared(peak(0.02))
    by_method = {name: row["rate"] for name, row in rows.items()}
    shrunk = comparison.shrink_ratios(runs, by_method["Stable-LoRA"])
    ranked = comparison.ranks(runs, by_method)
    assert [(row["shrink_ratio"], row["stop_rule"]) for row in shrunk] == [(0, True), (0.05, True), (0.05, False)]
    assert shrunk[1]["runs"] == rows["Stable-LoRA"]["runs"]
    assert [(r["method"], r["scaling"], r["rank"]) for r in ranked][:3] == [
        ("AdamW", "lora", 2),
        ("AdamW", "lora", 4),
        ("AdamW", "rslora", 2),
    ]
    assert ranked[1]["runs"] == rows["AdamW"]["runs"]
    assert list(ranked[2]["runs"])[0] == "compare_sizes,AdamW,lr=0.02,rank=2,scaling=rslora,seed=0"


def test_a_run_is_what_its_name_says(tmp_path):
    study = study_of(tmp_path)
    own = {"optimizer.stop_rule": False, "lora.rank": 4}
    name, config = study.point("compare_sizes", "Stable-LoRA", 0.03, 5, own)
    assert name == "compare_sizes,Stable-LoRA,lr=0.03,stop_rule=False,seed=5"
    optimizer = to_dict(config)["optimizer"]
    assert (optimizer["name"], optimizer["learning_rate"], optimizer["stop_rule"]) == ("stable_lora", 0.03, False)
    assert (config.seed, config.steps, config.output) == (5, 4, str(tmp_path / "out" / "runs" / name))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_loaded(name, tmp_path):
    study = load_study(name, tmp_path, [], None, configs.find)
    preset = study.preset
    assert list(preset.learning_rates) == sorted(preset.learning_rates)
    found = study.point(study.task, preset.method, preset.learning_rates[0], 0).config
    assert found.optimizer.shrink_ratio in preset.shrink_ratios
    assert found.lora.rank in preset.ranks
    assert study.task not in preset.forgetting
    assert (FOLDER / f"{name}.yaml").read_text().startswith("#")


MISTAKES = {
    "learning_rates: [0.01, 0.02]": ("learning_rates: [0.02, 0.01]", "learning_rates must ascend"),
    "seeds: [0, 1]\n": ("seeds: []\n", "seeds is empty"),
    "learning_rates: ": ("learning_rate: ", "learning_rate is not a key"),
    "shrink_ratios: [0, ": ("shrink_ratios: [1, ", r"shrink_ratios must be in \[0, 1\)"),
    "  AdamW: ": ("  Adam: ", "baseline 'AdamW' is none of methods: Adam"),
    "steps: 4,": ("stepz: 4,", "stepz"),
    "seeds: [0, 1]": ("seeds: [0, 0]", "seeds names a value twice"),
    "LoRA+: {": ("../LoRA: {", "methods.'../LoRA' is no name of a directory"),
    "LoRA+: {o": ("'L oRA': {o", "methods.'L oRA' is no name of a directory"),
    "{name: lora_plus}": ("{name: lora_plus, learning_rate: 0.1}", r"methods.LoRA\+.optimizer.learning_rate"),
    "\nwiden": ("\nmethod: LoRA+\nwiden", r"shrink_ratio"),
    "\nwiden: 2": ("\nmethod: AdamW\nwiden: 2", "baseline and method are both 'AdamW'"),
    "ranks: [2, 4]": ("ranks: [2, 4]\nforgetting: [helaswag]", "forgetting: helaswag is none of hellaswag"),
    "{train_limit: 64, validation_limit: 8}": (
        "{name: jsonl, path: DATA}",
        "tasks.compare_sizes is not multiple choice, so there is no accuracy: set metric: loss",
    ),
    "warmup_steps: 1}": ("warmup_steps: 1}, evaluate: false", "evaluate: true"),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_one_line(text, tmp_path, stablelora):
    new, said = MISTAKES[text]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.jsonl").write_text('{"prompt": "a", "completion": " b"}\n' * 8)
    path = write(tmp_path, TEXT.replace(text, new).replace("DATA", str(tmp_path / "data")))
    code, _, err = stablelora("reproduce", path, "--output", tmp_path / "out")
    assert code == 2 and re.search(said, err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_preset_and_overrides_after_options(tmp_path, stablelora):
    code, _, err = stablelora("reproduce", "quik", "--output", tmp_path / "out", "seed=1")
    assert code == 2 and "there is no preset 'quik': name one of quick, real-cpu, real-gpu, paper" in err


def test_differences_over_seeds_and_questions():
    generator = np.random.default_rng(0)
    a, b = generator.random((3, 40)) < 0.7, generator.random((3, 40)) < 0.5
    found = difference(a.mean(1).tolist(), b.mean(1).tolist(), (a, b))
    theirs = stats.ttest_rel(a.mean(0), b.mean(0))
    interval = theirs.confidence_interval()
    np.testing.assert_allclose(found.mean, a.mean() - b.mean())
    np.testing.assert_allclose([found.p_value, found.low, found.high], [theirs.pvalue, *interval], rtol=1e-9)
    std = math.sqrt((a.mean(1).var(ddof=1) + b.mean(1).var(ddof=1)) / 2)
    np.testing.assert_allclose(found.std, std)
    assert found.beyond == (abs(found.mean) > 2 * std)


@pytest.mark.parametrize(("shift", "beyond"), [(0.2, True), (0.13, False), (-0.2, True)])
def test_two_standard_deviations_are_the_bound(shift, beyond):
    """The deviation of both is 0.0707: shifts of 2.8 and of 1.8 of it."""
    assert difference([0.5 + shift, 0.6 + shift], [0.5, 0.6]).beyond is beyond


def test_what_no_test_can_say():
    assert mean_std([0.5, math.nan]) == (None, None) and mean_std([0.5]) == (0.5, None)
    assert difference([0.5], [math.nan]) is None
    assert difference([0.5], [0.25])[1:] == (None,) * 5
    same = np.ones((2, 5), bool)
    assert difference([1, 1], [1, 1], (same, same))[2:] == (False, 0.0, 0.0, None)


class Links(HTMLParser):
    """Identifiers, targets inside the page, paths of links, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.inner, self.paths, self.said = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        if "id" in own:
            self.ids.append(own["id"])
        if tag == "a":
            (self.inner if own["href"].startswith("#") else self.paths).append(own["href"])

    def handle_data(self, data):
        self.said.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole study, small: its directory, the path of its YAML file, and the lines that were logged."""
    base = tmp_path_factory.mktemp("study")
    text = TEXT.replace("learning_rates: [0.01, 0.02]", "learning_rates: [0.01]").replace("widen: 2", "widen: 0")
    text = text.replace("shrink_ratios: [0, 0.05]", "shrink_ratios: [0.05]").replace("ranks: [2, 4]", "ranks: [4]")
    path, lines = write(base, text), []
    reproduce.reproduce(str(path), base / "out", find=configs.find, log_fn=lines.append, command="the command")
    return SimpleNamespace(output=base / "out", path=path, lines=lines)


@pytest.mark.long
def test_results_hold_every_number(made):
    found = json.loads((made.output / "results.json").read_text())
    assert [row["method"] for row in found["methods"]] == ["AdamW", "LoRA+", "Stable-LoRA"]
    for row in (*found["methods"], *found["shrink_ratios"], *found["ranks"]):
        for name, value in row["runs"].items():
            summary = json.loads((made.output / "runs" / name / "summary.json").read_text())
            assert summary["after"]["acc"] == value
        assert row["mean"] == np.mean(list(row["runs"].values()))
    assert {row["method"] for row in found["overhead"]} == {"AdamW", "LoRA+", "Stable-LoRA"}
    assert all(row["milliseconds"] > 0 and row["state_bytes"] > 0 for row in found["overhead"])
    assert found["overhead"][0]["relative"] == 1
    assert found["command"] == "the command" and not found["failed"] and not found["forgetting"]
    logs = [(made.output / "runs" / name / "metrics.jsonl").read_text() for name in found["terms"].values()]
    rows = [json.loads(line) for text in logs for line in text.splitlines()]
    assert any("stability" in row for row in rows)


@pytest.mark.long
def test_the_page_leads_to_every_run(made):
    page = Links((made.output / "index.html").read_text())
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.inner} <= set(page.ids)
    assert page.paths and all((made.output / unquote(path)).exists() for path in page.paths)
    linked = {Path(unquote(path)).name for path in page.paths}
    assert {path.name for path in (made.output / "runs").iterdir() if path.is_dir()} <= linked
    text = "".join(page.said)
    assert [letter for letter in "abcdefgh" if f"({letter})" not in text] == []
    assert "Stable-LoRA minus AdamW" in text and "Not measured by this preset." in text
    said = (made.output / "results.md").read_text()
    assert said.count("\n## (") == 8 and "| Stable-LoRA | " in said


@pytest.mark.long
def test_the_same_command_repeats_nothing(made, monkeypatch):
    lines, before = [], (made.output / "results.json").read_text()
    for name in ("overhead", "forgetting"):
        monkeypatch.setattr(reproduce, name, None)
    reproduce.reproduce(str(made.path), made.output, find=configs.find, log_fn=lines.append, command="the command")
    told = lambda text: {k: v for k, v in json.loads(text).items() if k not in ("seconds", "date")}
    assert told((made.output / "results.json").read_text()) == told(before)
    seconds = [json.loads(text)["seconds"] for text in (before, (made.output / "results.json").read_text())]
    assert seconds[1] < 2 * seconds[0]


@pytest.mark.long
def test_a_study_of_other_settings_is_not_mixed_in(made, stablelora):
    before = (made.output / "results.json").read_bytes()
    code, _, err = stablelora("reproduce", made.path, "--output", made.output, "max_length=63")
    assert code == 2 and "has other settings than this command: choose another --output" in err
    assert (made.output / "results.json").read_bytes() == before


@pytest.mark.parametrize("name", ["results.json", "results.md", "index.html"])
def test_a_file_of_another_origin_is_refused(name, tmp_path, stablelora):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    code, _, err = stablelora("reproduce", write(tmp_path), "--output", tmp_path / "out")
    assert code == 2 and f"{name} is no file of this study" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_part_that_is_interrupted_keeps_what_it_has(tmp_path):
    study = study_of(tmp_path)

    def interrupted(kept, save):
        kept["one"] = {"acc": 0.5}
        save()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce._part(study, {}, "forgetting", interrupted)
    assert reproduce._part(study, {}, "forgetting", lambda kept, save: [kept]) == [{"one": {"acc": 0.5}}]
    assert reproduce._part(study, {}, "forgetting", None) == [{"one": {"acc": 0.5}}]


def test_a_failed_run_is_said_and_not_counted(compared):
    rows, _, runs = compared(lambda own: None if own.seed == 1 else peak(0.02)(own))
    assert rows["AdamW"]["mean"] is None and rows["AdamW"]["rate"] == 0.02
    found = comparison.differences(runs, list(rows.values()))
    assert [row["mean"] for row in found] == [None, None]


def test_forgetting(tmp_path, monkeypatch):
    """The base once, each run once, also after an interruption; a run without an adapter makes its mean empty."""
    study = study_of(tmp_path, TEXT.replace("ranks: [2, 4]", "ranks: [2, 4]\nforgetting: [hellaswag, openbookqa]"))
    asked, saved, kept = [], [], {"": {"hellaswag": 0.5, "openbookqa": 0.25}}
    result = {"compare_sizes,AdamW,lr=0.01,seed=0": 0.25, "compare_sizes,AdamW,lr=0.01,seed=1": 0.75}
    monkeypatch.setattr(forgetting, "load_base", lambda config: None)
    monkeypatch.setattr(forgetting, "has_adapter", lambda path: "Stable-LoRA,lr=0.02,seed=1" not in str(path))
    monkeypatch.setattr(forgetting, "_subject", lambda study, base, name: asked.append(name) or name)
    monkeypatch.setattr(
        forgetting, "_accuracies", lambda study, name: {"hellaswag": result.get(name, 1.0), "openbookqa": 0.0}
    )
    rates = {"AdamW": 0.01, "Stable-LoRA": 0.02}
    found = forgetting.forgetting(study, rates, lambda text: None, kept, lambda: saved.append(len(kept)))
    assert len(asked) == 3 == len(set(asked)) and "" not in asked and saved == [2, 3, 4]
    first, second = found[:2]
    assert (first["task"], first["method"], first["before"], first["mean"]) == ("hellaswag", "AdamW", 0.5, 0.5)
    assert math.isclose(first["std"], np.std([0.25, 0.75], ddof=1)) and first["runs"] == result
    assert (second["method"], second["mean"], second["std"]) == ("Stable-LoRA", None, None)
    assert [row["task"] for row in found] == ["hellaswag"] * 2 + ["openbookqa"] * 2 and found[2]["before"] == 0.25


WIDTHS = Path(__file__).parents[2] / "experiments" / "results" / "width-scaling.json"
SHORT = ("two_tasks", "a_method_fails", "no_ablations")
WORLDS = {  # text of the preset, and the accuracy or loss of a configuration
    "whole": (TEXT, lambda own: peak(0.02)(own) + own.seed / 50),
    "one_seed": (TEXT.replace("seeds: [0, 1]", "seeds: [0]"), peak(0.02)),
    "two_tasks": (TEXT.replace("limit: 8}}}", "limit: 8}}, two: {task: {validation_limit: 8}}}"), peak(0.02)),
    "no_ablations": (TEXT.replace("shrink_ratios: [0, 0.05]\nranks: [2, 4]\n", ""), peak(0.02)),
    "no_shrink": (TEXT.replace("[0, 0.05]", "[0]"), peak(0.02)),
    "a_method_fails": (TEXT, lambda own: None if own.optimizer.name == "stable_lora" else peak(0.02)(own)),
    "all_fail": (TEXT, lambda own: None),
    "loss": (TEXT.replace("widen: 2", "widen: 2\nmetric: loss"), lambda own: 2 - peak(0.02)(own)),
}


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in WORLDS])
def test_pages_of_all_kinds_of_results(name, compared, tmp_path, monkeypatch):
    text, value = WORLDS[name]
    monkeypatch.setattr(comparison, "_both_correct", lambda *given: None)
    if name == "loss":
        monkeypatch.setattr(comparison.Runs, "value", lambda runs, point: value(point.config))
    rows, _, runs = compared(value, text)
    study = runs.study
    rates = {row["method"]: row["rate"] for row in rows.values()}
    tasks = [row for task in study.preset.tasks for row in comparison.compare(runs) if row["task"] == task]
    made = {"methods": tasks, "differences": comparison.differences(runs, tasks)}
    made |= {
        "shrink_ratios": comparison.shrink_ratios(runs, rates["Stable-LoRA"]),
        "ranks": comparison.ranks(runs, rates),
    }
    made |= {"terms": {}, "overhead": [], "forgetting": [], "failed": runs.failed, "name": "<own>", "seconds": 60.0}
    made |= {
        "command": "c",
        "date": "d",
        "environment": {"devices": "e"},
        "settings": {"preset": to_dict(study.preset)},
    }
    (tmp_path / "out" / "width-scaling").mkdir(parents=True)
    (tmp_path / "out" / "width-scaling" / "results.json").write_bytes(WIDTHS.read_bytes())
    results = json.loads(json.dumps(plain(made)))
    sections = reproduce_page.sections(results, study.output)
    page, text = Links(reproduce_page.page(results, sections)), reproduce_page.text(results, sections)
    assert {link.removeprefix("#") for link in page.inner} <= set(page.ids)
    said = "".join(page.said)
    assert "<own>" in said and text.count("\n## (") == 8
    assert ("failed" in text) == name.endswith(("fails", "fail"))
    assert ("mean of these tasks" in text) == (name == "two_tasks")
    assert ("nats per token" in text) == (name == "loss")
    assert (text.count("Not measured by this preset.") == 4) == (name == "no_ablations")


def test_names_of_runs_differ_where_the_runs_do(tmp_path):
    study = study_of(tmp_path)
    names = {study.point("compare_sizes", "AdamW", rate, 0).name for rate in (0.01, 0.010000001)}
    assert len(names) == 2
    odd = load_study(str(write(tmp_path)), tmp_path / "a #b: {c}", [], None, configs.find)
    name, config = odd.point("compare_sizes", "AdamW", 0.01, 0)
    assert config.output == str(tmp_path / "a #b: {c}" / "runs" / name)


@pytest.mark.parametrize("override", ["seed=3", "output=x", "optimizer.learning_rate=1", "optimizer.name=adamw"])
def test_what_a_study_sets_itself_is_no_override(override, tmp_path, stablelora):
    code, _, err = stablelora("reproduce", write(tmp_path), "--output", tmp_path / "out", override)
    assert code == 2 and f"{override}: a study sets {override.split('=')[0]} itself" in err
