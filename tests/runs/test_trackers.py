"""TensorBoard, W&B and MLflow: each step once, in one run, also after a kill; fakes where they are not installed."""

import json
import os
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest

from stablelora_jax import InputError, LoraSpec
from stablelora_jax.runs.log import open_log
from stablelora_jax.runs.trackers import TRACKERS, open_trackers, require_installed, settings
from stablelora_jax.utils.errors import RunError


@pytest.fixture
def run(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text(
        "lora:\n  rank: 4\n  target_modules: [q_proj]\n  rank_pattern: {}\nsteps: 3\n"
    )
    return tmp_path / "r"


def twice(run, name):
    """A run that is killed after step 3, and goes on from step 2."""
    (tracker,) = open_trackers(run, (name,), 0)
    tracker.write(0, {"validation/loss": 2.0})
    for step in (1, 2, 3):
        tracker.write(step, {"train/loss": 1.0 / step})
    tracker.write(3, {"stability/a": 1.0})
    if name != "tensorboard":
        tracker.close()
    (tracker,) = open_trackers(run, (name,), 2)
    for step in (3, 4):
        tracker.write(step, {"train/loss": 1.0 / step})
    tracker.write(3, {"validation/loss": 1.5})
    tracker.close()


LOSSES = {1: 1.0, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4}


def test_settings_have_dotted_keys(run, tmp_path):
    assert settings(run) == {"lora.rank": 4, "lora.target_modules": ["q_proj"], "lora.rank_pattern": {}, "steps": 3}
    assert settings(tmp_path) == {}
    for damaged in ("a: [", "- 1", "\x00"):
        (run / "config.yaml").write_text(damaged)
        with pytest.raises(InputError, match="config.yaml"):
            settings(run)


@pytest.mark.parametrize(
    "name,message",
    [
        ("wandb", "trackers: wandb is not installed: pip install wandb, or leave it out"),
        ("mlflow", "trackers: mlflow is not installed: pip install mlflow, or leave it out"),
        ("visdom", "there is no tracker 'visdom'; there are tensorboard, wandb, mlflow"),
    ],
)
def test_what_is_not_installed_is_named_before_training(run, monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    for ask in (
        lambda: require_installed(["tensorboard", name]),
        lambda: open_log(run, 0, 1, abs, LoraSpec(), trackers=[name]),
    ):
        with pytest.raises(InputError) as error:
            ask()
        assert str(error.value) == message
    assert [p.name for p in run.iterdir()] == ["config.yaml"]


def test_a_folder_that_is_only_called_so_is_no_package(run, tmp_path, monkeypatch):
    (tmp_path / "mlflow").mkdir()
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match="pip install mlflow"):
        require_installed(["mlflow"])
    sys.modules.pop("mlflow", None)


def events(directory):
    """Every event, file by file, its framing checked."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    for path in sorted((directory / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            body = data[12 : 12 + size]
            assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
            assert struct.unpack("<I", data[12 + size : 16 + size]) == (masked_crc32c(body),)
            yield Event.FromString(body)
            data = data[16 + size :]


def test_tensorboard_forgets_what_a_resumed_run_writes_again(run):
    twice(run, "tensorboard")
    assert len(list((run / "tensorboard").iterdir())) == 2
    shown, first = {}, True
    for event in events(run):
        assert not first or event.file_version == "brain.Event:2"
        first = False
        if event.HasField("session_log"):
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        for value in event.summary.value:
            assert (value.tag, event.step) not in shown
            shown[value.tag, event.step] = value.simple_value
    assert {step: value for (tag, step), value in shown.items() if tag == "train/loss"} == pytest.approx(LOSSES)
    assert shown["validation/loss", 0] == 2.0 and shown["validation/loss", 3] == 1.5 and ("stability/a", 3) not in shown


def test_tensorboard_itself_shows_each_step_once(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    twice(run, "tensorboard")
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        (s, pytest.approx(v)) for s, v in LOSSES.items()
    ]
    assert [e.step for e in board.Scalars("validation/loss")] == [0, 3]


def test_every_event_is_on_disk_at_once_and_a_lost_directory_is_named(run):
    (tracker,) = open_trackers(run, ("tensorboard",), 0)
    tracker.write(1, {"train/loss": 1.0})
    assert [v.tag for e in events(run) for v in e.summary.value] == ["train/loss"], "nothing to flush at a kill"
    for path in (run / "tensorboard").iterdir():
        path.unlink()
    (run / "tensorboard").rmdir()
    with pytest.raises(RunError, match="cannot write .*tfevents.*: No such file or directory"):
        tracker.write(2, {"train/loss": 1.0})


def fake_wandb(server):
    """W&B as far as it is used: a run of an id goes on, and its step never goes back."""
    module = ModuleType("wandb")
    module.Settings = lambda **given: given

    def init(**given):
        server.setdefault("inits", []).append(given)
        rows = server.setdefault(given["id"], {})

        def log(numbers, step):
            assert step >= current.step, "W&B would warn and drop it"
            current.step = step
            rows.setdefault(step, {}).update(numbers)

        current = SimpleNamespace(step=max(rows) + 1 if rows else 0, log=log)
        current.finish = lambda: server.setdefault("finished", []).append(given["id"])
        return current

    module.init = init
    return module


def test_wandb_goes_on_in_the_same_run(run, monkeypatch):
    server = {}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(server))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    twice(run, "wandb")
    one, two = server["inits"]
    assert one == two and one["resume"] == "allow" and one["project"] == "mine" and one["dir"] == str(run)
    assert one["config"]["lora.rank"] == 4 and one["name"] == "r"
    assert json.loads((run / "trackers.json").read_text()) == {"wandb": one["id"]}
    assert server["finished"] == [one["id"]] * 2
    assert {step: row["train/loss"] for step, row in server[one["id"]].items() if step} == LOSSES


def fake_mlflow(server):
    """MLflow as far as it is used; like the real one it would keep a step that is logged twice."""

    class MlflowClient:
        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id=name) if name in server else None

        def create_experiment(self, name):
            server[name] = True
            return name

        def create_run(self, experiment, run_name):
            server["run"] = {"name": run_name, "in": experiment, "metrics": [], "params": []}
            return SimpleNamespace(info=SimpleNamespace(run_id="run"))

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(params) <= 100
            server[run_id]["metrics"] += metrics
            server[run_id]["params"] += params

        def update_run(self, run_id, status):
            server[run_id]["status"] = status

        def get_run(self, run_id):
            return SimpleNamespace(data=SimpleNamespace(metrics={m.key: m.value for m in server[run_id]["metrics"]}))

        def get_metric_history(self, run_id, key):
            return [m for m in server[run_id]["metrics"] if m.key == key]

        def set_terminated(self, run_id):
            server[run_id]["status"] = "FINISHED"

    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    entities.Param = lambda key, value: (key, value)
    module.MlflowClient, module.entities = MlflowClient, entities
    return {"mlflow": module, "mlflow.entities": entities}


def test_mlflow_goes_on_in_the_same_run(run, monkeypatch):
    server = {}
    for name, module in fake_mlflow(server).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    (run / "config.yaml").write_text("".join(f"key_{i}: {i}\n" for i in range(230)))
    twice(run, "mlflow")
    found = server["run"]
    assert (found["name"], found["in"], found["status"]) == ("r", "stablelora_jax", "FINISHED")
    assert [(m.step, m.value) for m in found["metrics"] if m.key == "train/loss"] == list(LOSSES.items())
    assert [m.step for m in found["metrics"] if m.key == "validation/loss"] == [0, 3]
    assert len(found["params"]) == 230 and ("key_7", "7") in found["params"]


def test_a_service_that_fails_while_training_is_left_out(run, monkeypatch, capsys):
    module, calls = fake_wandb({}), []

    def init(**_):
        return SimpleNamespace(step=0, log=lambda *_, **__: calls.append(1) or 1 / 0, finish=lambda: calls.append(2))

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = open_log(run, 0, 3, lambda count: 0.1, LoraSpec(), trackers=["wandb"])
    for step in (1, 2):
        log.write_step(step, {"loss": 1.0, "tokens": 1, "latches": ()})
    log.close()
    assert calls == [1] and capsys.readouterr().err == "warning: wandb is left out from here on: division by zero\n"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_service_that_cannot_start_is_an_error_before_training(run, monkeypatch):
    module = fake_wandb({})
    module.init = lambda **_: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(InputError, match="trackers: wandb cannot start: division by zero"):
        open_trackers(run, ("wandb",), 0)
    (run / "trackers.json").write_text("{")
    with pytest.raises(InputError, match=f"^{run}/trackers.json is not readable JSON"):
        open_trackers(run, ("wandb",), 0)
    (run / "tensorboard").write_text("")
    with pytest.raises(RunError, match="cannot write .*tfevents"):
        open_trackers(run, ("tensorboard",), 0)


def test_numbers_that_are_not_finite_are_not_sent(run, monkeypatch):
    sent = []
    monkeypatch.setitem(
        TRACKERS, "tensorboard", lambda *_: SimpleNamespace(write=lambda *a: sent.append(a), close=None)
    )
    log = open_log(run, 0, 3, lambda count: 0.1, LoraSpec())
    log.write_step(1, {"loss": float("nan"), "gradient_norm": 2.0, "tokens": 1, "latches": (), "skipped": 1})
    log.write_evaluation(1, {"loss": 0.5, "acc": float("inf"), "answers": [1], "questions": 1})
    (step, train), evaluation = sent
    assert step == 1 and "train/loss" not in train and "train/step" not in train
    assert train["train/skipped"] == 1.0 and train["train/gradient_norm"] == 2.0
    assert evaluation == (1, {"validation/loss": 0.5})


def wandb_records(path):
    """What a .wandb file holds: LevelDB's log format, after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_the_real_wandb_offline(run, monkeypatch):
    wandb = pytest.importorskip("wandb")
    if not hasattr(wandb, "init"):
        pytest.skip("wandb is a folder")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    twice(run, "wandb")
    identity, rows = json.loads((run / "trackers.json").read_text())["wandb"], []
    for path in sorted((run / "wandb").glob(f"offline-run-*/run-{identity}.wandb")):
        histories = [[*r.history.item] for r in wandb_records(path) if r.WhichOneof("record_type") == "history"]
        found = [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items} for items in histories]
        assert len({row["_step"] for row in found}) == len(found)
        rows.append({row["_step"]: row for row in found})
    assert {s: rows[0][s]["train/loss"] for s in (1, 2, 3)} | {4: rows[1][4]["train/loss"]} == LOSSES
    assert rows[0][0]["validation/loss"] == 2.0 and rows[0][3]["stability/a"] == 1.0


def test_the_real_mlflow(run, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    if not hasattr(mlflow, "MlflowClient"):
        pytest.skip("mlflow is a folder")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.chdir(tmp_path)
    twice(run, "mlflow")
    client, run_id = mlflow.MlflowClient(), json.loads((run / "trackers.json").read_text())["mlflow"]
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")] == list(LOSSES.items())
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and found.data.params["lora.rank"] == "4" and os.path.isdir("mlruns")
    (run / "trackers.json").write_text('{"mlflow": "0123456789abcdef0123456789abcdef"}')
    with pytest.raises(InputError, match="trackers: mlflow cannot start: Run .* not found"):
        open_trackers(run, ("mlflow",), 0)
