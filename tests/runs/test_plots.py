"""Pictures from metrics.jsonl alone, of one run and of several, finished or not."""

import json
import subprocess
import sys

import numpy as np
import pytest

from stablelora_jax import LoraSpec, config
from stablelora_jax.config.optimizer import CONFIGS
from stablelora_jax.config.run import RunConfig
from stablelora_jax.runs import plots
from stablelora_jax.runs.curves import labels, ratios_of, read_curves
from stablelora_jax.runs.panels import thin
from stablelora_jax.runs.records import append_record
from stablelora_jax.utils.errors import RunError
from tests.conftest import ROOT

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def log(directory, losses, **more):
    """A run directory with a record a step."""
    directory.mkdir(parents=True, exist_ok=True)
    for step, loss in enumerate(losses, 1):
        norms = {f"norm_{x}{end}": 1.0 / step for x in "ab" for end in ("", "_min", "_max")}
        append_record(directory / "metrics.jsonl", {"step": step, "loss": loss, "learning_rate": 1e-3, **norms, **more})
    return directory


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_two_pictures(tmp_path):
    assert plots.draw(tmp_path) == []
    for step in range(1, 6):
        norms = {f"norm_{x}{end}": 1.0 / step for x in "ab" for end in ("", "_min", "_max")}
        record = {"step": step, "loss": 2.0 / step, "learning_rate": 1e-3, "shrinking": 2, **norms}
        append_record(
            tmp_path / "metrics.jsonl", record | ({"stopped": ["model.layers.0.q_proj"]} if step == 3 else {})
        )
    append_record(tmp_path / "metrics.jsonl", {"step": 5, "validation": {"acc": 1.0}})
    pictures = plots.draw(tmp_path)
    assert [picture.name for picture in pictures] == ["loss.png", "norms.png"]
    for picture in pictures:
        assert picture.read_bytes()[:8] == PNG and picture.stat().st_size > 10_000


def test_a_third_picture_where_a_record_has_the_terms(tmp_path, drawn):
    fields, pairs = ("delta1", "delta2", "delta3", "shrink", "a", "b"), ("layers.0.q_proj", "layers.1.q_proj")
    for step in range(1, 6):
        norms = {f"norm_{x}{end}": 1.0 / step for x in "ab" for end in ("", "_min", "_max")}
        record = {"step": step, "loss": 2.0 / step, "learning_rate": 1e-3, "shrinking": 2, **norms}
        terms = {name: {field: step * 4.0**i for field in fields} for i, name in enumerate(pairs)}
        for pair in terms.values():
            pair |= {"shrink": 0.0} | ({"delta2": 0.0} if step == 2 else {})  # nothing that a log axis can show
        append_record(tmp_path / "metrics.jsonl", record | ({"stability": terms} if step % 2 == 0 else {}))
    picture = plots.draw(tmp_path)[-1]
    assert picture.name == "stability.png" and picture.read_bytes()[:8] == PNG and picture.stat().st_size > 10_000
    upper, lower = drawn[-1].axes
    shown = {label.split(" = ")[0]: points for label, points in lines(upper).items()} | lines(lower)
    np.testing.assert_allclose(shown["delta1"], [[2, 4], [4, 8]])  # the geometric mean of 1 and 4 times the step
    np.testing.assert_allclose(shown["delta2"], [[4, 8]])
    assert shown.keys() == {"delta1", "delta2", "delta3", "||A|| / in", "||B|| / out"}
    low, high = upper.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == (2, 16) and upper.get_yscale() == lower.get_yscale() == "log"


def pairs_log(directory, pairs, stop=None, steps=6):
    """A run whose pairs have the ratios 8, 4, 2 ...; those of ``stop`` stop at its step."""
    stop = stop or {}
    names = [f"model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj" for i in range(pairs)]
    directory.mkdir(parents=True, exist_ok=True)
    for step in range(1, steps + 1):
        norms = {f"norm_{x}{end}": 1.0 / step for x in "ab" for end in ("", "_min", "_max")}
        record = {"step": step, "loss": 1.0, "learning_rate": 1e-3, "shrinking": pairs, **norms}
        stopped = [names[i] for i, when in stop.items() if when == step]
        ratios = {name: None if step == 1 else 16.0 * (i + 1) / 2**step for i, name in enumerate(names)}
        append_record(directory / "metrics.jsonl", record | {"stop_ratios": ratios, "stopped": stopped})
    return directory


def test_the_ratio_of_each_pair_and_where_it_stops(tmp_path, drawn):
    plots.draw(pairs_log(tmp_path, 4, {0: 5, 1: 6}))
    upper, lower = drawn[-1].axes
    assert {"||A||, mean", "||B||, mean", "a pair stops shrinking"} <= lines(upper).keys()
    assert lower.get_yscale() == "log" and lower.get_ylim()[0] < 1 < lower.get_ylim()[1]
    shown = lines(lower)
    np.testing.assert_array_equal(shown["layer 0"], [[1, np.nan], [2, 4], [3, 2], [4, 1], [5, 0.5], [6, 0.25]])
    assert shown["a pair stops (2)"].tolist() == [[5, 1], [6, 1]] and "layer 1" in shown
    last = [line.get_xydata()[-1].tolist() for line in lower.lines]
    assert last[:4] == [[6, 0.25], [6, 0.5], [6, 0.75], [6, 1.0]], "one line a pair"
    assert "2 of 4 pairs have stopped, the first at step 5, the last at step 6" in " ".join(
        drawn[-1].get_supxlabel().split()
    )


def test_of_many_pairs_the_spread_and_three_pairs(tmp_path, drawn):
    plots.draw(pairs_log(tmp_path / "many", 120, {100: 3, 7: 4, 2: 6}))
    lower = drawn[-1].axes[1]
    shown = lines(lower)
    assert {"first to stop: 50 q_proj", "median: 3 v_proj", "last to stop: 1 q_proj"} <= shown.keys()
    assert shown["first to stop: 50 q_proj"][1].tolist() == [2, 404] and len(lower.lines) < 8
    every, half = (band.get_paths()[0].get_extents().get_points()[:, 1] for band in lower.collections)
    assert every.tolist() == [0.25, 480] and half[0] > every[0] and half[1] < every[1]
    plots.draw(pairs_log(tmp_path / "none", 120))
    assert {"lowest: 0 q_proj", "median: 30 q_proj", "highest: 59 v_proj"} <= lines(drawn[-1].axes[1]).keys()
    assert "None of the 120 pairs has reached 1" in drawn[-1].get_supxlabel()


def test_an_older_log_has_ratios_only_beside_its_stability_terms(tmp_path):
    log(tmp_path / "old", [1.0, 1.0])
    assert ratios_of(read_curves(tmp_path / "old")).values.shape == (0, 0)
    terms = {"x": {"a": 3.0, "b": 2.0}, "y": {"a": 1.0, "b": 0.0}}
    log(tmp_path / "terms", [1.0, 1.0], stability=terms)
    found = ratios_of(read_curves(tmp_path / "terms"))
    assert found.names == ["x", "y"] and found.steps.tolist() == [1, 2]
    np.testing.assert_array_equal(found.values, [[1.5, np.nan]] * 2)
    assert not read_curves(tmp_path / "terms").has_stop_rule


def test_thinned_curves_keep_their_ends_and_spikes():
    steps, values = np.arange(1, 10_001), np.ones(10_000)
    values[[5000, 7000]] = 50, np.nan
    few, kept, same = thin(steps, values, 2 * values)
    assert len(few) <= 602 and (few[0], few[-1]) == (1, 10_000) and 5001 in few and kept.max() == 50
    np.testing.assert_array_equal(same, 2 * kept)
    assert len(thin(steps[:9], values[:9])[0]) == 9


def test_skipped_steps_and_evaluations_are_marked_and_null_is_a_gap(tmp_path, drawn):
    log(tmp_path, [4.0, None, 2.0])
    append_record(tmp_path / "metrics.jsonl", {"step": 3, "validation": {"loss": 1.5}})
    append_record(tmp_path / "metrics.jsonl", {"step": 4, "loss": None, "learning_rate": 1e-3, "skipped": True})
    append_record(tmp_path / "metrics.jsonl", {"step": 4, "validation": {"loss": float("inf")}})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a run that goes on, in the middle of a line
    assert [p.name for p in plots.draw(tmp_path)] == ["loss.png", "norms.png"]
    shown = lines(drawn[0].axes[0])
    np.testing.assert_array_equal(shown["each step"], [[1, 4], [2, np.nan], [3, 2], [4, np.nan]])
    assert shown["validation"].tolist() == [[3, 1.5]] and shown["skipped (1)"].tolist() == [[4, 0.02]]
    smooth = shown["smoothed"][:, 1]
    np.testing.assert_allclose(smooth, [4, 4, (0.9 * 4 + 2) / 1.9, (0.9 * 4 + 2) / 1.9])
    assert drawn[0].axes[0].get_yscale() == "log"
    log(tmp_path / "null", [None, None])
    assert len(plots.draw(tmp_path / "null")) == 2


def begin(directory, **keys):
    log(directory, [2.0, 1.0])
    (directory / "config.yaml").write_text(config.dump(RunConfig(output=str(directory), **keys)))
    return directory


def test_runs_are_called_by_what_differs(tmp_path):
    rates = [begin(tmp_path / str(r), optimizer=CONFIGS["stable_lora"](learning_rate=r)) for r in (1e-3, 2e-5)]
    assert labels(rates) == ["optimizer.learning_rate=0.001", "optimizer.learning_rate=2e-05"]
    assert labels([*rates, begin(tmp_path / "s", seed=3)])[2].endswith("seed=3")
    other = begin(tmp_path / "adamw", optimizer=CONFIGS["adamw"]())
    one, two = labels([begin(tmp_path / "stable"), other])
    assert "optimizer.name=stable_lora" in one and "shrink_ratio=0.0005" in one
    assert "optimizer.name=adamw" in two and "shrink_ratio" not in two and "output" not in one + two
    same = [begin(tmp_path / "a"), begin(tmp_path / "b")]
    assert labels(same) == ["a", "b"] and labels([log(tmp_path / "c" / "a", [1.0]), same[0]])[0] != "a"
    again = labels([*same, begin(tmp_path / "r", lora=LoraSpec(rank=2))])
    assert again == ["a (lora.rank=8)", "b (lora.rank=8)", "lora.rank=2"]


def test_several_runs_in_one_picture(tmp_path, drawn, monkeypatch, capsys):
    one, two = (begin(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("two", 2)))
    append_record(two / "metrics.jsonl", {"step": 2, "validation": {"loss": 0.5}})
    before = (one / "metrics.jsonl").read_bytes()
    assert plots.main([str(one), str(two), "--output", str(tmp_path / "new" / "out")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(str(run / name) for run in (one, two) for name in ("loss.png", "norms.png")),
        str(tmp_path / "new" / "out" / "losses.png"),
    ]
    assert (tmp_path / "new" / "out" / "losses.png").read_bytes()[:8] == PNG
    shown = lines(drawn[-1].axes[0])
    assert shown["seed=1"].tolist() == shown["seed=2"].tolist() == [[1, 2], [2, pytest.approx((0.9 * 2 + 1) / 1.9)]]
    points = [line for line in drawn[-1].axes[0].lines if line.get_xydata().tolist() == [[2, 0.5]]]
    (own,) = (line for line in drawn[-1].axes[0].lines if line.get_label() == "seed=2")
    assert [line.get_color() for line in points] == [own.get_color()]
    assert (one / "metrics.jsonl").read_bytes() == before
    monkeypatch.chdir(tmp_path)
    assert plots.main(["one", "two"]) == 0 and (tmp_path / "losses.png").is_file()
    assert plots.main(["one", "--output", "alone"]) == 0
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == ["loss.png", "norms.png"]


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    append_record(tmp_path / "begun" / "metrics.jsonl", {"step": 0, "data": {}})
    for name, message in (
        ("nowhere", "there is no run directory"),
        ("empty", "has no metrics.jsonl: it is no run directory, or its run has not begun"),
        ("begun", "metrics.jsonl holds no step yet"),
    ):
        assert plots.main([str(log(tmp_path / "good", [1.0])), str(tmp_path / name)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and message in said.err and said.err.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert plots.main([str(tmp_path / "good"), "--output", str(tmp_path / "file" / "x")]) == 1
    assert "error: cannot write" in capsys.readouterr().err
    with pytest.raises(RunError, match="cannot write"):
        plots.draw(tmp_path / "good", tmp_path / "file" / "x")


def test_a_long_run_is_kept_as_columns(tmp_path):
    record = json.dumps({"step": 7, "loss": 1.0, "learning_rate": 0.1, **{f"norm_{i}": 0.5 for i in range(30)}})
    (tmp_path / "metrics.jsonl").write_text((record + "\n") * 2000)
    curves = read_curves(tmp_path)
    assert curves.series["loss"].shape == curves.steps.shape == (2000,) and np.isnan(curves.series["norm_a"]).all()


def test_the_module_is_a_command(tmp_path):
    log(tmp_path, [1.0, 0.0])
    done = subprocess.run(
        [sys.executable, "-m", "stablelora_jax.runs.plots", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "" and "loss.png" in done.stdout
