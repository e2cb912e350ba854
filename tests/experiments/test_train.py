"""experiments/train.py as a user meets it: help, and one line and exit code 2 for every mistake."""

import importlib.util
import os
import signal
import subprocess
import sys

import pytest

from stablelora_jax.runs import run as module
from stablelora_jax.utils.errors import Interrupted, RunError
from tests.conftest import ROOT
from tests.helpers import long


def train(*arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "experiments" / "train.py"), *arguments]
    environment = {**os.environ, "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_help_shows_every_key_of_the_top_level():
    done = train("--help")
    assert done.returncode == 0
    for key in ("model", "task", "lora", "optimizer", "schedule", "seed", "batch_size", "trackers"):
        assert f"\n  {key} " in done.stdout


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["lora.rnk=4"], "lora.rnk"),
        long(["steps=many"], "steps"),
        long(["optimizer.shrink_ratio=1.5"], "shrink_ratio"),
        (["lora.target_modules=[q_prj]"], "q_prj"),
        long(["--config", "no/such.yaml"], "no/such.yaml"),
        long(["model.path=no/such/model/dir"], "no/such/model/dir"),
        long(["task={name: arc_easy, path: nowhere}"], "nowhere"),
        long(["task.name=arc_hard"], "arc_hard"),
        long(["steps=0"], "steps must be at least 1"),
        long(["schedule.warmup_steps=999"], "warmup_steps"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = train(*arguments, f"output={tmp_path / 'r'}", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = train(f"output={tmp_path / 'file' / 'r'}")
    assert done.returncode == 2 and "cannot write to" in done.stderr


@pytest.mark.parametrize(
    "error,code,line",
    [
        (RunError("cannot write r: no space"), 1, "error: cannot write r: no space"),
        (Interrupted(signal.SIGTERM, "interrupted: step 3 is saved"), 143, "interrupted: step 3 is saved"),
        (KeyboardInterrupt(), 130, "interrupted: the same command resumes from the newest checkpoint"),
    ],
)
def test_how_a_run_that_stops_ends(monkeypatch, capsys, error, code, line):
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "experiments" / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def stop(config, log_fn):
        assert config.seed == 5
        raise error

    monkeypatch.setattr(module, "run", stop)
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=5"])
    assert script.main() == code and capsys.readouterr().err == line + "\n"
