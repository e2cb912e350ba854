"""bench.py gpu: every row runs on the CPU, what fails is a row that says why, and no row is lost or done twice."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stablelora_jax import InputError
from tests.conftest import ROOT

HIDDEN = """import importlib.machinery as machinery
real = machinery.PathFinder.find_spec
hidden = ('torch', 'peft', 'datasets', 'tunix', 'qwix')
machinery.PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.split('.')[0] in hidden else real(name, path, target))
"""


@pytest.fixture(autouse=True)
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def command(output, *flags):
    return [sys.executable, str(ROOT / "experiments" / "bench.py"), "gpu", "--output", str(output), *flags]


def bench(output, *flags, **environment):
    env = {**os.environ, **environment}
    return subprocess.run(command(output, *flags), env=env, capture_output=True, text=True, timeout=900)


def rows_of(output):
    return {path.stem: json.loads(path.read_text()) for path in (Path(output) / "rows").glob("*.json")}


def measurement(function, name=None, **more):
    from bench.gpu.suite import SERVING, Measurement

    given = {"seconds": 60.0, "arguments": {}, **more}
    return Measurement(name or function, SERVING, f"tests.experiments.gpu_rows:{function}", **given)


def ran(output, *measurements, minutes=5.0, **more):
    """The rows after a session in this process."""
    from bench.gpu import rows
    from bench.gpu.runner import Session, run

    with rows.opened(output, False) as place:
        run(Session(place, time.monotonic() + 60 * minutes, **more), measurements)
    return rows_of(output)


TRAINING = "train.qwen2-0.5b.stable_lora,train.qwen2-0.5b.peft-eager,mark.qwen3-4b.auto,mark.llama3.1-8b.nothing"
ONE_OF_EACH = f"right,{TRAINING},profile,serve"


@pytest.mark.parametrize(
    "only", [pytest.param(None, marks=pytest.mark.soak), pytest.param(ONE_OF_EACH, marks=pytest.mark.long)]
)
def test_rows_of_the_list_run(tmp_path, only):
    """Without torch, peft or tunix their rows say so; all others are done, and what must hold holds."""
    from bench.gpu.suite import suite

    flags = ["--rehearse", *(["--only", only] if only else [])]
    asked = {one.name for one in suite() if one.name.startswith(tuple(only.split(",")) if only else "")}
    done = bench(tmp_path / "out", *flags, "--budget-minutes", "13")
    found = rows_of(tmp_path / "out")
    assert done.returncode == 0 and set(found) == asked and len(asked) > 12, done.stderr
    for name, row in found.items():
        peer = "peft" in name or "tunix" in name
        assert row["status"] == "done" or (peer and row["status"] == "absent"), (name, row)
        assert row["card"] and row["source"] and row["versions"]["jax"] and row["date"] and name in row["command"]
        assert row["measured"].get("ok", True) if row["status"] == "done" else row["why"]
        if name.startswith(("train", "mark")) and row["status"] == "done":
            low, high = row["measured"]["step_seconds_quartiles"]
            assert low <= row["measured"]["step_seconds"] <= high and row["measured"]["tokens_per_second"] > 0
            assert row["measured"].get("remat") == row["arguments"].get("remat", "save_dots") or peer
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Rehearsal of" in report and "**NO**" not in report and ("Not measured yet" in report) == bool(only)
    for part in ("| qwen3-4b, auto (save_dots) |", "| llama3.1-8b, nothing |", "published", "one adapter, seconds"):
        assert part in report
    assert bench(tmp_path / "out", *flags).returncode == 0
    again = rows_of(tmp_path / "out")  # what lacks a package is tried again, and nothing else
    assert {name: row for name, row in again.items() if row["status"] == "done"} == {
        name: row for name, row in found.items() if row["status"] == "done"
    }


@pytest.mark.long
def test_without_torch_peft_and_datasets_the_rest_is_measured(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    peers = "train.qwen2-0.5b.peft-eager,train.qwen2-0.5b.peft-compile,train.llama3.2-1b.tunix"
    only = f"{peers},right.resume,serve.loading"
    paths = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = bench(tmp_path / "out", "--rehearse", "--only", only, PYTHONPATH=paths)
    assert done.returncode == 0 and "3 absent" in done.stdout and "2 done" in done.stdout
    found = rows_of(tmp_path / "out")
    for name, package in {"train.qwen2-0.5b.peft-eager": "torch", "train.qwen2-0.5b.peft-compile": "torch"}.items():
        assert found[name]["why"] == f"{package} is not installed here"
    assert "google-tunix is not installed" in found["train.llama3.2-1b.tunix"]["why"]
    assert found["right.resume"]["measured"]["ok"] and found["right.resume"]["measured"]["equal_to_the_bit"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- train.qwen2-0.5b.peft-eager: absent, torch is not installed here" in report
    assert "- right.logits\n" in report.split("## Not measured yet")[1]


@pytest.mark.long
def test_rows_that_are_spoilt_on_purpose_hinder_no_other(tmp_path):
    spoilt = ["serve.generation=crash", "serve.loading=hang", "train.qwen2-0.5b.adamw=memory"]
    flags = [word for text in spoilt for word in ("--spoil", text)]
    only = "train.qwen2-0.5b.adamw,serve"
    done = bench(tmp_path / "out", "--rehearse", "--only", only, "--row-seconds", "45", *flags)
    assert done.returncode == 0, done.stderr
    found = rows_of(tmp_path / "out")
    assert found["serve.generation"]["status"] == "failed" and "exit code -6" in found["serve.generation"]["why"]
    assert found["serve.loading"]["status"] == "timeout"
    assert found["serve.loading"]["why"] == "not finished within 45 s"
    row = found["train.qwen2-0.5b.adamw"]
    assert row["status"] == "done" and row["arguments"]["batch"] == 1 and row["tried"][0]["batch"] == 2
    assert "RESOURCE_EXHAUSTED" in row["tried"][0]["why"]
    assert found["serve.saving"]["status"] == found["serve.bank"]["status"] == "done"
    assert "reduced: out of memory" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.long
def test_what_became_of_a_process_is_its_row(tmp_path):
    kinds = ["fine", "crash", "leave", "fail", "absent", "killed"]
    hang = measurement("hang", arguments={"pids": str(tmp_path / "pids")}, seconds=10.0)
    found = ran(tmp_path / "out", *map(measurement, kinds), hang)
    statuses = {name: row["status"] for name, row in found.items()}
    assert statuses == {"fine": "done", "crash": "failed", "leave": "failed", "fail": "failed", "absent": "absent",
                        "killed": "memory", "hang": "timeout"}  # fmt: skip
    assert found["fine"]["measured"] == {"value": 3, "batch": 1} and "why" not in found["fine"]
    assert found["leave"]["why"].startswith("ended with exit code 3")
    assert found["fail"]["why"] == "ValueError: the first line"
    assert found["absent"]["why"] == "a_package_that_is_not_there is not installed here"
    assert "what a library prints" in (tmp_path / "out" / "logs" / "fine.txt").read_text()
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert gone(pid)


def test_out_of_memory_is_tried_with_half_the_rows(tmp_path):
    some = measurement("memory", "some", arguments={"batch": 8, "fits": 2})
    none = measurement("memory", "none", arguments={"batch": 2, "fits": 0})
    found = ran(tmp_path / "out", some, none)
    assert found["some"]["status"] == "done" and found["some"]["measured"] == {"batch": 2}
    assert [one["batch"] for one in found["some"]["tried"]] == [8, 4] and found["some"]["arguments"]["batch"] == 2
    assert found["none"]["status"] == "memory" and [one["batch"] for one in found["none"]["tried"]] == [2]


def test_the_batch_is_halved_while_a_micro_batch_gets_smaller():
    from bench.gpu.runner import halved

    seen, given = [], {"batch": 8, "accumulate": 4, "length": 16}
    while given:
        seen.append((given["batch"], given["accumulate"]))
        given = halved(given)
    assert seen == [(8, 4), (4, 4)] and halved({"length": 3}) is None and halved({"batch": 1}) is None


def gone(pid, seconds=10):
    for _ in range(10 * seconds):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":  # dead; nobody has asked for its exit code
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


SCRIPT = """
import sys, time
from pathlib import Path
from tests.experiments.test_bench_gpu import measurement
from bench.gpu import rows
from bench.gpu.runner import Session, run
output, count, jobs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with rows.opened(output, False) as place:
    print("opened", flush=True)
    known = rows.read(place)
    every = [measurement("fine", f"r{i}", arguments={"value": i, "seconds": 0.1, "journal": f"{output}/j{i}"})
             for i in range(count)]
    run(Session(place, time.monotonic() + 100), [one for one in every if one.name not in known], jobs)
"""


@pytest.mark.long
def test_killed_at_any_moment_no_row_is_lost_or_changed(tmp_path):
    draw, seen, count = random.Random(0), {}, 8
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), str(count), "2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "experiments")])}
    for kill in [True] * 5 + [False]:
        process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout.readline() == "opened\n"  # the lock of the one before is free
        if kill:
            time.sleep(draw.uniform(0.05, 1.2))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert kill or process.returncode == 0
        found = {path.name: path.read_bytes() for path in (tmp_path / "out" / "rows").glob("*.json")}
        assert seen == {name: found[name] for name in seen}
        seen = found
    assert {row["measured"]["value"] for row in rows_of(tmp_path / "out").values()} == set(range(count))


@pytest.mark.long
def test_a_row_ends_with_the_command_that_began_it(tmp_path):
    code = SCRIPT.replace('"fine"', '"hang"').replace(
        'arguments={"value": i, "seconds": 0.1, "journal": f"{output}/j{i}"}', 'arguments={"pids": f"{output}/pids{i}"}'
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "experiments")])}
    words = [sys.executable, "-c", code, str(tmp_path / "out"), "1", "1"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    for number in (signal.SIGKILL, signal.SIGINT):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(words, env=env, **quiet)
        pids = tmp_path / "out" / "pids0"
        for _ in range(300):
            time.sleep(0.1)
            if pids.exists() and len(pids.read_text().split()) == 2:
                break
        process.send_signal(number)
        process.wait(30)
        assert all(gone(int(pid)) for pid in pids.read_text().split())
        assert rows_of(tmp_path / "out") == {}
        pids.unlink()


@pytest.mark.long
def test_what_the_budget_cuts_off_is_left_for_the_next_call(tmp_path):
    slow = measurement("fine", "slow", arguments={"seconds": 30.0}, seconds=15.0)
    quick, big = measurement("fine", "quick", seconds=15.0), measurement("fine", "big", seconds=60.0)
    found = ran(tmp_path / "out", quick, big, slow, minutes=(5.0 + 12.0) / 60)
    assert set(found) == {"quick"}
    again = ran(tmp_path / "out", measurement("fine", "slow"))
    assert set(again) == {"quick", "slow"} and again["quick"] == found["quick"]


def test_retry_measures_what_failed_and_nothing_else(tmp_path, monkeypatch):
    import argparse

    from bench import gpu as bench_gpu

    parser = argparse.ArgumentParser()
    bench_gpu.add_options(parser)
    works = [measurement("fine"), measurement("fail", "mended")]
    monkeypatch.setattr(bench_gpu, "suite", lambda: works)
    call = lambda *more: bench_gpu.bench(parser.parse_args(["--output", str(tmp_path / "out"), *more]))
    call()
    first = rows_of(tmp_path / "out")
    assert first["mended"]["status"] == "failed"
    works[1] = measurement("fine", "mended")
    call()
    assert rows_of(tmp_path / "out") == first
    call("--retry")
    assert (
        rows_of(tmp_path / "out")["fine"] == first["fine"] and rows_of(tmp_path / "out")["mended"]["status"] == "done"
    )


def test_nothing_measured_on_a_cpu_counts_as_a_gpus(tmp_path, monkeypatch):
    from bench.gpu.child import run_measurement

    arguments = {"function": "tests.experiments.gpu_rows:on_a_cpu", "arguments": {}}
    assert run_measurement(**arguments, gpu=False) == {"status": "done", "measured": {"device": "cpu"}}
    found = run_measurement(**arguments, gpu=True)
    assert found["status"] == "failed" and "no GPU found" in found["why"]


def test_what_most_rows_need_is_looked_for_first(tmp_path, monkeypatch, capsys):
    from bench import front
    from bench import gpu as bench_gpu

    monkeypatch.setattr(bench_gpu, "REQUIRED", ("flax", "a_package_that_is_not_there"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "gpu", "--output", str(tmp_path / "out")])
    assert front.main() == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.startswith("error: not installed here: a_package_that_is_not_there: ")


def test_differences_see_what_is_not_finite_and_what_has_not_moved():
    import numpy as np
    from bench.gpu.right import check_bounds, relative_error, relative_norm_error

    fine, bad = np.ones(3), np.array([1.0, np.nan, 1.0])
    assert relative_error((fine, fine * 1.5, fine), (fine, fine, fine)) == 0.5 and relative_error(fine, fine) == 0
    assert np.isnan(relative_error((fine, bad, fine), (fine, fine, fine)))
    assert np.isnan(relative_norm_error((fine, bad), (fine, fine))) and relative_norm_error((fine * 0,), (fine,)) == 1
    assert (
        not check_bounds({"a": float("nan")}, {"a": 1.0})["ok"] and check_bounds({"a": 0.5, "b": 9.0}, {"a": 1.0})["ok"]
    )


DOORS = {
    "--only nope": "--only: no row has the name or prefix 'nope': see --list",
    "--only right.logits,": "--only: no row has the name or prefix ''",
    "--budget-minutes 0": "--budget-minutes must be positive, not 0.0",
    "--budget-minutes nan": "--budget-minutes must be positive, not nan",
    "--row-seconds -1": "--row-seconds must be positive",
    "--spoil right.logits=melt": "--spoil takes NAME=HOW with HOW one of crash, hang, memory, not right.logits=melt",
    "--spoil nope=hang": "--spoil takes NAME=HOW",
    "--peer-python no/such/python": "--peer-python no/such/python is not a file",
}


@pytest.mark.parametrize("flags", DOORS)
def test_what_is_asked_wrongly_is_one_line(tmp_path, monkeypatch, capsys, flags):
    from bench import front

    monkeypatch.setattr(sys, "argv", ["bench.py", "gpu", "--output", str(tmp_path / "out"), *flags.split()])
    assert front.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {DOORS[flags]}") and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_directory_of_others_is_left_alone(tmp_path):
    from bench.gpu import rows

    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(InputError, match="is not empty and not from bench.py gpu"), rows.opened(tmp_path, False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    with pytest.raises(InputError, match="is not a directory"), rows.opened(tmp_path / "report.md", False):
        pass
    begun = tmp_path / "begun"  # by a process that was killed while it wrote the first file
    begun.mkdir()
    (begun / f".stablelora_jax-{'0' * 16}.partial").write_text("{")
    with rows.opened(begun, False):
        assert (begun / "suite.json").exists()
    with rows.opened(tmp_path / "out", False) as place:
        with pytest.raises(InputError, match="in use by another process"), rows.opened(place, False):
            pass
    with pytest.raises(InputError, match="contains real rows"), rows.opened(tmp_path / "out", True):
        pass
    row = {"name": "a", "status": "done", "value": 1}
    rows.write(tmp_path / "out", row)
    with pytest.raises(InputError, match="exists already"):
        rows.write(tmp_path / "out", {**row, "value": 2})
    assert rows.read(tmp_path / "out") == {"a": row}


@pytest.mark.parametrize(
    "text, said", [("{", "is not readable JSON: .*: remove it to measure it again"), ('{"name": 1}', "is not a row")]
)
def test_a_row_that_is_damaged_is_one_line(tmp_path, monkeypatch, capsys, text, said):
    from bench import front
    from bench.gpu import rows

    with rows.opened(tmp_path / "out", True):
        (tmp_path / "out" / "rows" / "serve.bank.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["bench.py", "gpu", "--rehearse", "--output", str(tmp_path / "out")])
    assert front.main() == 2
    found = capsys.readouterr().err
    assert re.match(f"error: .*serve.bank.json {said}", found) and found.count("\n") == 1
    assert [path.name for path in (tmp_path / "out" / "rows").iterdir()] == ["serve.bank.json"]


def test_the_report_sets_ours_beside_the_fastest_peer():
    from bench.gpu.report import report
    from bench.gpu.suite import suite

    def row(name, rate, memory, **more):
        one = next(one for one in suite() if one.name == name)
        measured = {"tokens_per_second": rate, "step_seconds": 0.5, "step_seconds_quartiles": [0.4, 0.6], "mfu": 0.312}
        measured |= {"peak_memory_bytes": memory, "compile_seconds": 7.0, "remat": "save_dots", **more}
        place = {"card": "C", "commit": "c", "source": "s", "date": "d", "versions": {"jax": "1"}}
        common = {"name": name, "section": one.section, "status": "done", "arguments": dict(one.arguments)}
        return common | place | {"measured": measured}

    made = [row("train.qwen2-0.5b.adamw", 300.0, 4e9), row("train.qwen2-0.5b.peft-eager", 100.0, 9e9)]
    made += [row("train.qwen2-0.5b.peft-compile", 150.0, 8e9), row("mark.qwen3-4b.auto", 2000.0, None, mfu=None)]
    text = report(suite(), {one["name"]: one for one in made})
    assert "2.00 times the speed of peft-compile (target 1.5), 0.50 of its memory (target 0.8)" in text
    assert "MFU 31.2 % (target 30 %)" in text and "Results of" in text
    assert "| adamw | 8 | 300 | 500.0 (400.0 to 600.0) | 31.2 % | 4.00 | 7.0 |" in text
    assert (
        "| qwen3-4b, auto (save_dots) | 8 in 4 | 2,000 | 500.0 (400.0 to 600.0) | - | - | 7.0 | surogate 15.9k" in text
    )
    assert "- right.logits\n" in text and "- mark.qwen3-4b.auto\n" not in text
