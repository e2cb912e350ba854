"""The study of widths: its identity, its fit, the exponents of a small run, and the command."""

import json
import re

import jax
import numpy as np
import pytest

from stablelora_jax.cli.main import main
from stablelora_jax.runs.files import is_page
from stablelora_jax.studies import slopes, width_page, width_results
from stablelora_jax.studies.width_panels import METHODS
from stablelora_jax.studies.width_scaling import (
    BATCH,
    RANK,
    SIZES,
    Config,
    Numbers,
    make_optimizer,
    measure,
    terms,
    train_step,
)
from stablelora_jax.training.stability import shrunk_adapters
from tests.runs.test_report import Page

R3 = dict(zip(METHODS, SIZES["test"].configs, strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "stable_lora", "lora_plus"])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_terms_add_up_to_the_change_of_the_output(x64, optimizer, stopped):
    numbers = Numbers(eta=1e-3, ratio=4.0, scale=3.0, a0=1.0, shrink_ratio=0.02 if optimizer == "stable_lora" else 0.0)
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = (jax.random.normal(key, (BATCH, 48)) for key in keys[:2])
    size = 1e-3 if stopped else 10.0  # A small beside B, where the stop rule holds, or large
    pair = {"lora_a": size * jax.random.normal(keys[2], (48, RANK)), "lora_b": jax.random.normal(keys[3], (RANK, 48))}
    before, tx = {"layer": pair}, make_optimizer(optimizer, numbers)
    (after, state), measured = train_step(tx, numbers, before, tx.init(before), x, y)
    found = terms(before, shrunk_adapters(before, state, numbers.shrink_ratio), after, numbers.scale, x)
    a, b, new_a, new_b = (tree["layer"][name] for tree in (before, after) for name in ("lora_a", "lora_b"))
    change = numbers.scale * (x @ new_a @ new_b - x @ a @ b)
    error = found.delta1 + found.delta2 + found.delta3 - found.shrink - change
    assert np.abs(error).max() < 1e-12 * np.abs(found.delta1).max()
    shrinks = optimizer == "stable_lora" and not stopped
    np.testing.assert_allclose(found.shrink, 0.02 * numbers.scale * x @ a @ b if shrinks else 0 * change, rtol=1e-9)
    assert measured["stopped"] == (optimizer == "stable_lora" and stopped)
    for name, term in found._asdict().items():
        assert float(measured[name]) == pytest.approx(float(np.sqrt(np.mean(np.square(term)))), rel=1e-12)


def test_slopes_of_known_power_laws():
    widths = [64, 128, 256, 512] * 2
    exact = slopes.fit(widths, [3 * n**-1.5 for n in widths])
    assert exact == pytest.approx((-1.5, -1.5, -1.5), abs=1e-12)
    flat = slopes.fit(widths, [7.0] * 8)
    assert flat == pytest.approx((0, 0, 0), abs=1e-12)
    assert slopes.fit([64, 128], [1, 4]) == (pytest.approx(2), None, None)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    widths = np.array([64, 128, 256, 512] * 2)
    fits = [slopes.fit(widths, widths**0.5 * np.exp(0.1 * draw.standard_normal(8))) for _ in range(2000)]
    assert 0.935 < np.mean([low < 0.5 < high for _, low, high in fits]) < 0.965


def test_theory():
    for name, eta, scale, a0, early, late in (
        ("R1", -0.5, 0.0, 0.0, -0.5, 0.0),
        ("R2", -1.5, 2.0, 0.0, 0.5, 0.5),
        ("R3", -2.0, 3.0, 0.0, 1.0, 1.0),
        ("small A", -2.0, 3.0, -1.0, 0.0, 0.0),
        ("constant", 0.0, 0.0, 0.0, 0.0, 1.0),
    ):
        said = slopes.theory(Config(name, eta, scale, a0=a0))
        assert (said["early"]["delta1"], said["late"]["delta1"]) == (early, late), name
    shrunk = slopes.theory(Config("R3", -2.0, 3.0, "stable_lora", shrink_ratio=0.02))
    assert (shrunk["early"]["delta1"], shrunk["late"]["delta1"], shrunk["late"]["az"]) == (1, 0, -1)


def test_a_window_needs_its_steps():
    def measured(stop):
        series = {name: np.full(60, np.e) for name in (*slopes.QUANTITIES, "loss")}
        return {**series, "stopped": np.arange(1, 61) >= stop}

    assert (slopes.stop_step(measured(20)), slopes.stop_step(measured(61))) == (20, None)
    assert set(slopes.windows(measured(51))) == {"early", "late", "after_stop"}
    assert set(slopes.windows(measured(52))) == set(slopes.windows(measured(61))) == {"early", "late"}


def test_measured_in_float64_whatever_is_configured():
    assert not jax.config.read("jax_enable_x64")
    found = measure(R3["Adam"], 64, 0, 8)
    assert not jax.config.read("jax_enable_x64")
    assert all(values.shape == (8,) and values.dtype in (np.float64, bool) for values in found.values())
    assert all(np.array_equal(values, measure(R3["Adam"], 64, 0, 8)[name]) for name, values in found.items())
    assert found["delta2"][0] == 0 < found["delta2"][1] and not found["shrink"].any() and not found["stopped"].any()


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The directory of the command's test size, its results, and what the command printed."""
    output = tmp_path_factory.mktemp("study") / "new" / "out"
    assert main(["width-scaling", "--output", str(output), "--size", "test"]) == 0
    return output, json.loads((output / "results.json").read_text())


def test_exponents_of_the_small_size(studied):
    _, results = studied
    adam, shrunk, small = (results["slopes"][config.name] for config in R3.values())
    assert adam["early"]["delta1"]["slope"] > 0.85 and abs(small["early"]["delta1"]["slope"]) < 0.15
    assert all(abs(found["early"][name]["slope"]) < 0.15 for found in (adam, small) for name in ("delta2", "delta3"))
    assert shrunk["late"]["ratio"]["slope"] < adam["late"]["ratio"]["slope"] - 0.25
    assert abs(shrunk["late"]["ratio"]["slope"]) < 0.15 and abs(small["late"]["ratio"]["slope"]) < 0.15
    assert shrunk["after_stop"]["delta1"]["slope"] < -0.4, "the overshoot"
    assert all(abs(found["early"]["a_step"]["slope"] - 1) < 0.15 for found in (adam, shrunk, small))
    assert "after_stop" not in adam


def test_wide_layers_stop_later(studied):
    _, results = studied
    stops = {(run["config"], run["seed"], run["width"]): run["stop_step"] for run in results["runs"]}
    for seed in (0, 1):
        own = [stops[R3["Stable-LoRA"].name, seed, width] for width in results["settings"]["widths"]]
        assert own == sorted(set(own)) and own == pytest.approx([83, 118, 161, 208], abs=8)
    assert {stop for (name, *_), stop in stops.items() if name != R3["Stable-LoRA"].name} == {None}


def test_results_hold_every_number(studied):
    _, results = studied
    assert len(results["runs"]) == 3 * 4 * 2 and results["steps"][-1] == results["settings"]["steps"] == 400
    run = results["runs"][0]
    assert set(run["curves"]) == {"delta1", "delta2", "delta3", "shrink", "az", "b", "loss"}
    assert all(len(curve) == len(results["steps"]) for curve in run["curves"].values())
    assert {"python", "jax", "optax"} <= set(results["environment"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results["date"]) and results["command"].endswith("--size test")


def test_the_page(studied):
    output, results = studied
    text = (output / "index.html").read_text()
    page = Page(text)
    assert text.startswith(width_page.MARK) and is_page(output / "index.html", width_page.MARK)
    assert (
        page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("svg") - text.count('class="key"')
    )
    assert page.tags.count("figure") == 12 and "script" not in page.tags and "link" not in page.tags
    assert not [value for _, name, value in page.attributes if name in ("src", "href") and not value.startswith("#")]
    assert page.said("h3")[-5:] == ["Slopes", "Configs", "Stop steps", "Final losses", "Environment"]
    assert [sentence.rstrip(".") for sentence in page.said("strong")] == ["Instability", "The shrink", "The overshoot"]
    slope = results["slopes"][R3["Adam"].name]["early"]["delta1"]["slope"]
    assert f"delta1: slope {slope:+.2f}" in page.text


def test_a_finished_study_is_not_computed_again(studied, stablelora, monkeypatch):
    output, _ = studied
    before = (output / "results.json").read_bytes()
    (output / "index.html").unlink()
    monkeypatch.setattr(width_results, "measure", None)
    assert stablelora("width-scaling", "--output", output, "--size", "test") == (0, f"{output / 'index.html'}\n", "")
    assert (output / "results.json").read_bytes() == before
    code, out, err = stablelora("width-scaling", "--output", output, "--size", "full")
    assert (code, out, err.count("\n")) == (2, "", 1) and "other settings than --size full" in err


def test_damaged_results_are_one_line(studied, tmp_path, stablelora, monkeypatch):
    output, results = studied
    monkeypatch.setattr(width_results, "measure", None)
    text = (output / "results.json").read_text()
    for damaged in (text[:-100], text.replace('"delta1"', '"delta0"'), width_results.to_text({**results, "runs": []})):
        (tmp_path / "results.json").write_text(damaged)
        code, out, err = stablelora("width-scaling", "--output", tmp_path, "--size", "test")
        assert (code, out, err.count("\n")) == (2, "", 1) and "results.json is" in err
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", ["results.json", "index.html"])
def test_a_file_of_another_origin_is_refused(tmp_path, stablelora, monkeypatch, name):
    monkeypatch.setattr(width_results, "measure", None)
    (tmp_path / name).write_text("mine")
    code, out, err = stablelora("width-scaling", "--output", tmp_path, "--size", "test")
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{name} is no file of this study" in err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    code, out, err = stablelora("width-scaling", "--output", tmp_path / name, "--size", "test")
    assert (code, out, err.count("\n")) == (2, "", 1) and "is no directory" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).symlink_to(tmp_path / name)
    code, out, err = stablelora("width-scaling", "--output", tmp_path / "other", "--size", "test")
    assert (code, out, err.count("\n")) == (2, "", 1) and "symbolic link" in err


def test_the_command_offers_what_there_is(stablelora):
    from stablelora_jax.cli import width_scaling

    assert set(width_scaling.SIZES) == set(SIZES)
    with pytest.raises(width_results.InputError, match="size must be one of full, test"):
        width_results.run_study("x", "huge")


@pytest.mark.soak
def test_exponents_of_the_full_size():
    """The measured exponents of the protocol, at every width; minutes."""
    results = width_results.study("full", "")
    found = {
        name: {(span, key): one["slope"] for span, own in spans.items() for key, one in own.items()}
        for name, spans in results["slopes"].items()
    }
    adam, shrunk, small = (found[f"R3 {name}"] for name in ("Adam", "Stable-LoRA", "small A"))
    assert adam["early", "delta1"] > 0.8 and found["R2 Adam"]["early", "delta1"] == pytest.approx(0.5, abs=0.15)
    assert all(abs(adam["early", name]) < 0.15 for name in ("delta2", "delta3"))
    assert adam["late", "ratio"] > 0.6 and shrunk["late", "ratio"] < 0.35 and abs(small["early", "delta1"]) < 0.15
    assert shrunk["late", "az"] == pytest.approx(-1, abs=0.15)
    assert found["R2 Stable-LoRA"]["late", "az"] == pytest.approx(-0.5, abs=0.15)
    assert found["R1 Adam"]["early", "delta1"] <= 0 and abs(found["LoRA+ scaling"]["early", "delta1"]) < 0.15
    assert found["constant eta, s"]["early", "delta2"] == pytest.approx(1, abs=0.15)
    low = "Stable-LoRA, e0 = 0.0001"
    assert all(found[f"R3 {low}"]["after_stop", name] < -0.9 for name in ("delta1", "delta3")), "the overshoot"
    assert found[f"R3 {low}"]["late", "az"] < -1.15 and abs(found["R3 small A, e0 = 0.0001"]["late", "delta1"]) < 0.15
    for name in ("R2 Stable-LoRA", "R3 Stable-LoRA", f"R3 {low}"):
        for seed in (0, 1):
            stops = [run["stop_step"] for run in results["runs"] if (run["config"], run["seed"]) == (name, seed)]
            assert stops == sorted(set(stops))
