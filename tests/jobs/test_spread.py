"""Workers of Ray: the results of one process, whichever worker a point goes on with, and whatever ends a worker."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stablelora_jax import InputError
from stablelora_jax.cli.main import main
from stablelora_jax.jobs import spread as module
from stablelora_jax.jobs.file import JobsConfig, read_record
from stablelora_jax.jobs.rounds import Rounds
from stablelora_jax.jobs.shards import SHARDS, digest, divide, gather, train_shard
from stablelora_jax.jobs.spread import Spread
from stablelora_jax.jobs.sweep import load_sweep, run_sweep
from stablelora_jax.runs.directory import create, locate
from stablelora_jax.runs.files import CHECKPOINTS, MARK
from stablelora_jax.training import checkpoint
from stablelora_jax.utils.errors import Interrupted
from tests.helpers import soak

pytestmark = pytest.mark.filterwarnings("ignore:os.fork")  # Ray's processes execute another program at once

TEXT = """
output: OUT
at_once: 2
tokens: 512
common:
  {steps: 4, batch_size: 8, evaluate: false, trackers: [], schedule: {warmup_steps: 1}, task: {train_limit: 50},
   lora: {rank: 2}, checkpoint_every: 2}
grid:
  optimizer.learning_rate: [1e-3, 1e-2]
  seed: [0, 1]
ray: {workers: 2}
"""


def load(place, *overrides, workers=2):
    path = place / "sweep.yaml"
    path.write_text(TEXT.replace("OUT", str(place / "out")))
    sweep, points = load_sweep(path, overrides)
    return replace(sweep, ray=None if workers is None else Spread(workers=workers)), points


def quiet(text):
    pass


def losses(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if "loss" in record]


def require_same(out, whole, names):
    """The companions of a point in its passes differ, and with them how sums are rounded."""
    for name in names:
        directory = whole / name
        mine, other = losses(out / directory.name), losses(directory)
        assert [step for step, _ in mine] == [1, 2, 3, 4] and mine == [
            (s, pytest.approx(x, rel=1e-5)) for s, x in other
        ]


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, as long as this file's tests."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, before)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sweep in this process."""
    pytest.importorskip("ray")
    place = tmp_path_factory.mktemp("whole")
    sweep, points = load(place, workers=None)
    done, failed = run_sweep(sweep, points, quiet)
    assert list(done) == list(points) and not failed
    return place / "out"


class Killed(BaseException):
    pass


def killed(patch, at):
    """Kill this process before round ``at``."""
    count, real = [0], Rounds.step

    def step(self, *given):
        count[0] += 1
        if count[0] == at:
            raise Killed
        return real(self, *given)

    patch.setattr(Rounds, "step", step)


def test_division():
    assert divide("abcdefg", 2, 8) == [["a", "b", "c"], ["d", "e", "f", "g"]]
    assert divide("abc", 8, 8) == [["a"], ["b"], ["c"]]
    parts = divide(list(range(100)), 3, 7)
    assert sum(parts, []) == list(range(100)) and len(parts) == 15 and {len(part) for part in parts} == {6, 7}


def test_without_ray(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    load(tmp_path)
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 2
    said = capsys.readouterr().err
    assert said == 'error: ray: spreading a sweep needs Ray: pip install "stablelora-jax[ray]"\n'
    assert not (tmp_path / "out").exists()


def test_mistakes_are_found_in_the_driver(tmp_path):
    with pytest.raises(InputError, match=r"ray\.worker is not a key \(did you mean ray\.workers\?\)"):
        (tmp_path / "sweep.yaml").write_text("{grid: {seed: [1]}, ray: {worker: 3}}")
        load_sweep(tmp_path / "sweep.yaml")
    sweep, points = load(tmp_path, "distributed={}")
    with pytest.raises(InputError, match="ray and distributed exclude each other"):
        run_sweep(sweep, points, quiet)
    assert not (tmp_path / "out").exists()


def test_the_records_of_shards(tmp_path):
    """Failures are carried from shard to shard, and no point goes back to where another division has left it."""

    def record(directory, steps, failed):
        directory.mkdir(parents=True, exist_ok=True)
        own = read_record(directory)
        own.steps, own.failed = steps, failed
        own.write()

    record(tmp_path, {}, {"a": "why"})
    for key, steps, failed in (("kept", {"b": 2}, {}), ("stale", {"c": 2}, {"d": "so"}), ("others", {"x": 1}, {})):
        record(tmp_path / SHARDS / key, steps, failed)
    for name in "ad":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(MARK)
    found = gather(tmp_path, "abcd", ["kept"])
    assert found.steps == {} and set(found.failed) == {"a", "d"}
    assert {path.parent.name for path in tmp_path.glob("shards/*/jobs.json")} == {"kept", "others"}


@pytest.mark.long
def test_workers_give_what_one_process_gives(cluster, whole, tmp_path, monkeypatch):
    """Relative paths are those of the driver; a finished sweep starts no worker."""
    monkeypatch.chdir(tmp_path)
    sweep, points = load(tmp_path)
    sweep = replace(sweep, output="out")
    points = {
        name: point._replace(config=replace(point.config, output=f"out/{name}")) for name, point in points.items()
    }
    said = []
    done, failed = run_sweep(sweep, points, said.append)
    assert list(done) == list(points) and not failed
    assert sum("shard 1 of 2: process " in line for line in said) == 1
    require_same(tmp_path / "out", whole, done)
    said.clear()
    monkeypatch.setattr(cluster, "remote", None)
    for workers in (2, 1):
        again = replace(sweep, ray=Spread(workers=workers))
        assert run_sweep(again, points, said.append) == (done, {})
    assert said == [f"{name} is finished" for name in points] * 2


@pytest.mark.long
@pytest.mark.parametrize("workers", [soak(1), 2])
def test_a_kill_and_another_number_of_workers(cluster, whole, tmp_path, monkeypatch, workers):
    sweep, points = load(tmp_path, workers=workers)
    names = list(points)[:2]  # a shard of two workers
    configs = {name: points[name].config for name in names}
    shard = tmp_path / "out" / SHARDS / digest(names)
    shard.mkdir(parents=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed(patch, 4)
        train_shard(JobsConfig(output=str(shard), at_once=2, tokens=512), configs, os.getcwd())
    assert read_record(shard).steps == dict.fromkeys(names, 2)
    logs = [tmp_path / "out" / name / "metrics.jsonl" for name in names]
    before = [path.read_text().splitlines()[:2] for path in logs]  # with times, which differ where a step is repeated
    last = list(points)[3]
    create(locate(points[last].config), points[last].config)
    record = read_record(tmp_path / "out")
    record.failed = {last: "before"}
    record.write()
    done, failed = run_sweep(replace(sweep, at_once=4 // workers), points, quiet)
    assert list(done) == list(points)[:3] and failed == {last: "before"}
    assert not (tmp_path / "out" / last / "metrics.jsonl").exists()
    assert [path.read_text().splitlines()[:2] for path in logs] == before
    assert (shard / "jobs.json").exists() == (workers == 2)
    require_same(tmp_path / "out", whole, done)


@pytest.mark.soak
def test_a_worker_that_dies(cluster, whole, tmp_path, monkeypatch):
    """Once: Ray tries again. Each time: its points fail with one line, others go on, and the next command ends them."""
    sweep, points = load(tmp_path)
    said, kills = [], []

    def kill(shard):
        def log(text):
            said.append(text)
            if text.startswith(f"shard {shard} of 2: process "):
                kills.append(int(text.split()[5]))
                os.kill(kills[-1], signal.SIGKILL)

        return log

    monkeypatch.setattr(module, "RETRIES", 1)
    done, failed = run_sweep(sweep, points, kill(1))
    assert len(kills) == 2 and list(failed) == list(points)[:2] and list(done) == list(points)[2:]
    assert all(why.startswith("shard 1 of 2 has died (") and "\n" not in why for why in failed.values())
    assert not read_record(tmp_path / "out").failed
    once = kill(1)
    done, failed = run_sweep(sweep, points, lambda text: (once if len(kills) == 2 else said.append)(text))
    assert len(kills) == 3 and list(done) == list(points) and not failed
    require_same(tmp_path / "out", whole, done)


@pytest.mark.soak
def test_a_signal_stops_the_workers_after_saving(cluster, tmp_path):
    sweep, points = load(tmp_path, "steps=100000", "checkpoint_every=100000")

    def send():
        until = time.monotonic() + 60
        while len(list(Path(sweep.output).glob("*/metrics.jsonl"))) < len(points) and time.monotonic() < until:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(Interrupted, match="SIGTERM: all points are saved") as error:
        run_sweep(sweep, points, quiet)
    assert error.value.signum == signal.SIGTERM
    for name in points:
        assert checkpoint.latest(Path(sweep.output) / name / CHECKPOINTS) > 0
