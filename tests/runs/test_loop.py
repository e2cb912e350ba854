"""What ends a run before its end, and what is due between two steps."""

import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from stablelora_jax import InputError, LoraSpec, config
from stablelora_jax.config.parallel import MeshConfig
from stablelora_jax.config.run import CompareSizesTask, DataConfig, RunConfig
from stablelora_jax.runs import log
from stablelora_jax.runs import run as module
from stablelora_jax.runs.run import run
from stablelora_jax.training import checkpoint
from stablelora_jax.utils.errors import Interrupted, RunError
from tests.helpers import long
from tests.runs.kill_and_resume import contents, equal, records

SHORT = RunConfig(
    task=CompareSizesTask(train_limit=64, validation_limit=8),
    lora=LoraSpec(rank=2, dropout=0.1),
    steps=6,
    batch_size=16,
    checkpoint_every=4,
    evaluate_every=3,
)


def quiet(text):
    pass


def signalled(monkeypatch, after):
    """As if SIGTERM came when the loop asks for the ``after``-th time."""
    asked = []

    @contextmanager
    def catch_signals():
        def received():
            asked.append(1)
            return signal.SIGTERM if len(asked) >= after else 0

        yield received

    monkeypatch.setattr(module, "catch_signals", catch_signals)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loop") / "whole"
    run(replace(SHORT, output=str(directory)), quiet)
    return directory


@pytest.mark.parametrize("after", [1, *map(long, [3, 5, 7])])
def test_a_signal_ends_the_step_saves_it_and_the_run_goes_on_from_there(whole, tmp_path, monkeypatch, after):
    mine = replace(SHORT, output=str(tmp_path / "r"))
    with monkeypatch.context() as patch:
        signalled(patch, after)
        with pytest.raises(
            Interrupted, match=r"SIGTERM after step \d, which is saved: the same command goes on"
        ) as end:
            run(mine, quiet)
    newest = checkpoint.latest(tmp_path / "r" / "checkpoints")
    assert end.value.signum == signal.SIGTERM and f"step {newest}," in str(end.value)
    assert max(record["step"] for record in records(tmp_path / "r")) == newest
    run(mine, quiet)
    assert records(tmp_path / "r") == records(whole)
    found, expected = contents(tmp_path / "r"), contents(whole)
    assert equal(found["adapter"], expected["adapter"]) and equal(found["state"], expected["state"])


def test_numbers_that_are_not_finite_end_the_run_with_the_last_good_state(tmp_path):
    mine = config.load(
        RunConfig, None, ["optimizer.learning_rate=1e30", "steps=20", "batch_size=8", "task.train_limit=64"]
    )
    mine = replace(mine, output=str(tmp_path / "r"), evaluate=False, max_consecutive_errors=3)
    with pytest.raises(
        RunError, match=r"not finite in 3 steps in a row, 1 to 3; .* checkpoint 4. Step 3 read .* texts \d"
    ):
        run(mine, quiet)
    assert checkpoint.latest(tmp_path / "r" / "checkpoints") == 4
    logged = [record for record in records(tmp_path / "r") if "loss" in record]
    assert [(record["step"], record["skipped"]) for record in logged] == [(step, True) for step in range(1, 5)]
    assert not (tmp_path / "r" / "adapter").exists()


@pytest.mark.long
def test_micro_batches_and_meshes_do_not_make_another_run(whole, tmp_path):
    """It is begun on one layout, and goes on, in the same directory, on another."""
    mine = replace(SHORT, output=str(tmp_path / "r"), gradient_accumulation_steps=2)
    import stablelora_jax.runs.run

    original = stablelora_jax.runs.run.catch_signals
    try:
        patch = pytest.MonkeyPatch()
        signalled(patch, 4)
        with pytest.raises(Interrupted):
            run(mine, quiet)
    finally:
        patch.undo()
    assert stablelora_jax.runs.run.catch_signals is original
    run(replace(mine, parallel=MeshConfig(fsdp=4, tensor=2), gradient_accumulation_steps=1, checkpoint_every=5), quiet)
    expected = [record["loss"] for record in records(whole) if "loss" in record]
    found = [record["loss"] for record in records(tmp_path / "r") if "loss" in record]
    assert found == pytest.approx(expected, rel=1e-4)


def test_epochs_are_steps(tmp_path):
    mine = replace(SHORT, output=str(tmp_path / "r"), epochs=1.5, evaluate_every=None, evaluate=False)
    assert run(mine, quiet)["steps"] == 6, "1.5 x 64 rows / 16"
    assert config.load(RunConfig, tmp_path / "r" / "config.yaml").epochs == 1.5


def test_what_is_due_after_minutes(tmp_path):
    mine = replace(SHORT, output=str(tmp_path / "r"), steps=4, checkpoint_every=100, evaluate_every=None)
    run(replace(mine, checkpoint_minutes=1e-9, evaluate_minutes=1e-9, keep_checkpoints=9), quiet)
    assert checkpoint.steps(tmp_path / "r" / "checkpoints") == [1, 2, 3, 4]
    assert [record["step"] for record in records(tmp_path / "r") if "validation" in record] == [0, 1, 2, 3, 4]


def test_minutes_count_from_the_last_checkpoint_and_the_last_evaluation(tmp_path, monkeypatch):
    """A step takes twenty seconds; what has become due after a step is done after the next."""
    from stablelora_jax.runs import loop

    now, make = [0.0], loop.make_step

    def slow(job):
        step = make(job)
        return lambda state, number: (now.__setitem__(0, now[0] + 20), step(state, number))[1]

    monkeypatch.setattr(loop, "make_step", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    mine = replace(SHORT, output=str(tmp_path / "r"), steps=9, checkpoint_every=100, evaluate_every=None)
    run(replace(mine, checkpoint_minutes=1.0, evaluate_minutes=1.0, keep_checkpoints=9), quiet)
    assert checkpoint.steps(tmp_path / "r" / "checkpoints") == [4, 8, 9]
    assert [record["step"] for record in records(tmp_path / "r") if "validation" in record] == [0, 4, 8, 9]


def test_the_loop_passes_on_its_micro_batches(tmp_path, monkeypatch):
    from stablelora_jax.runs import loop

    original, asked = loop.make_train_step, []

    def made(*arguments, **options):
        asked.append(options["accumulate"])
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "make_train_step", made)
    run(
        replace(
            SHORT,
            output=str(tmp_path / "r"),
            steps=1,
            evaluate_every=None,
            evaluate=False,
            gradient_accumulation_steps=2,
        ),
        quiet,
    )
    assert asked == [2]


def test_a_crash_while_changes_are_accepted_leaves_a_run(whole, tmp_path, monkeypatch):
    import shutil

    from stablelora_jax.runs import directory as run_directory

    shutil.copytree(whole, tmp_path / "r")
    longer, write = replace(SHORT, output=str(tmp_path / "r"), steps=8, accept_changes=True), run_directory.write_whole
    asked = []

    def full(path, text):
        asked.append(path.name)
        if len(asked) == 1:
            raise OSError(28, "No space left on device")
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_whole", full)
        with pytest.raises(RunError, match="No space left"):
            run(longer, quiet)
    assert asked == ["config.yaml"] and (tmp_path / "r" / "config-until-6.yaml").is_file()
    assert run(longer, quiet)["steps"] == 8 and (tmp_path / "r" / "adapter-until-6").is_dir()


def test_changed_data_and_another_metric_are_accepted(whole, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "r")
    mine = replace(
        SHORT, output=str(tmp_path / "r"), steps=8, task=CompareSizesTask(train_limit=48, validation_limit=8)
    )
    mine = replace(mine, metric="acc", select="best", keep_checkpoints=1, accept_changes=True)
    summary = run(mine, quiet)
    assert summary["steps"] == 8 and summary["data"]["texts"] == 48 and (tmp_path / "r" / "adapter").is_dir()


def test_changes_are_refused_unless_accepted_and_nothing_is_lost(whole, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "r")
    longer = replace(SHORT, output=str(tmp_path / "r"), steps=8)
    with pytest.raises(InputError, match=r"configuration \(steps is 6 there and 8 here\): .* accept_changes=true"):
        run(longer, quiet)
    assert run(replace(longer, accept_changes=True), quiet)["steps"] == 8
    there = {path.name for path in (tmp_path / "r").iterdir()}
    assert {"summary-until-6.json", "adapter-until-6", "config-until-6.yaml", "adapter", "summary.json"} <= there
    assert [r["step"] for r in records(tmp_path / "r") if "loss" in r] == list(range(1, 9))
    with pytest.raises(InputError, match=r"lora.rank is 2 there and 3 here"):
        run(replace(longer, lora=LoraSpec(rank=3, dropout=0.1)), quiet)
    with pytest.raises(InputError, match=r"there and .* here"):
        run(replace(longer, lora=LoraSpec(rank=3, dropout=0.1), accept_changes=True), quiet)


def test_a_directory_has_one_writer(whole, tmp_path):
    from stablelora_jax.runs.directory import lock

    mine = replace(SHORT, output=str(tmp_path / "r"))
    (tmp_path / "r").mkdir()
    with lock(tmp_path / "r"), pytest.raises(InputError, match="is being written by process .* on .*: wait for it"):
        run(mine, quiet)
    assert {path.name for path in (tmp_path / "r").iterdir()} == {".lock"}


@pytest.mark.soak
def test_two_thousand_steps_leak_nothing(tmp_path, monkeypatch):
    """Neither memory nor compilations grow, with evaluations, asynchronous checkpoints and a log."""
    compiled, seen, write = [], {}, log.RunLog.write_step
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )

    def watched(self, step, metrics):
        write(self, step, metrics)
        lines = Path("/proc/self/status").read_text().splitlines()
        seen[step] = int(next(line for line in lines if line.startswith("RssAnon")).split()[1]), len(compiled)

    monkeypatch.setattr(log.RunLog, "write_step", watched)
    mine = replace(SHORT, steps=2000, batch_size=8, checkpoint_every=100, evaluate_every=500)
    run(replace(mine, data=DataConfig(batching="pack"), max_length=64, output=str(tmp_path / "r")), quiet)
    assert seen[2000][0] < 1.05 * seen[100][0] and seen[2000][1] == seen[100][1], (seen[100], seen[2000])
