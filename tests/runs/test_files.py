"""What a run's directory may hold: a user's own file where a run writes is refused by name, and stays to the byte."""

import json
import os

import matplotlib.figure
import pytest

from stablelora_jax import InputError, config
from stablelora_jax.config.run import RunConfig
from stablelora_jax.runs import plots
from stablelora_jax.runs.directory import create, locate, lock
from stablelora_jax.runs.files import MARK, is_picture, is_run
from stablelora_jax.runs.records import append_record
from tests.utils.test_outputs import snapshot

FIRST = '{"step": 0, "data": {"texts": 3, "digest": "d"}}\n'
ADAPTER = {"adapter/adapter_config.json": "{}"}


def put(directory, files):
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


def begun(directory, run_config=None, files=()):
    """The directory of a run, made as a run makes it."""
    run_config = run_config or RunConfig(output=str(directory))
    located = locate(run_config)
    with lock(located.path):
        create(located, run_config)
    put(directory, {"metrics.jsonl": FIRST, **dict(files)})
    return run_config


FOREIGN = {  # files of a user's in a directory of his -> what is named
    "a thesis": ({"thesis.tex": "x"}, "is no run directory"),
    "an empty configuration": ({"config.yaml": ""}, "config.yaml was not written by a run"),
    "a configuration by hand": ({"config.yaml": "# two days of thought\nseed: 4\n"}, "config.yaml was not written"),
    "of another program": ({"config.yaml": "foo: 1\n"}, "config.yaml was not written by a run"),
    "a lock": ({".lock": "precious"}, "is no run directory"),
    "a lock beside nothing of ours": ({".lock": "process 12 of the treaty"}, "is no run directory"),
    "numbers": ({"metrics.jsonl": FIRST}, "is no run directory"),
}


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_of_a_users_is_refused(tmp_path, name, accept):
    files, message = FOREIGN[name]
    put(tmp_path, files)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        locate(RunConfig(output=str(tmp_path), accept_changes=accept))
    assert "choose another output=" in str(caught.value) and snapshot(tmp_path) == before


def test_a_configuration_by_hand_that_names_its_own_directory_is_not_replaced(tmp_path):
    put(tmp_path, {"config.yaml": f"# by hand\nseed: 4\noutput: {tmp_path}\n", "metrics.jsonl": '{"step": 1}\n'})
    before = snapshot(tmp_path)
    for accept in (False, True):
        with pytest.raises(InputError, match="config.yaml was not written by a run"):
            locate(config.load(RunConfig, tmp_path / "config.yaml", [f"accept_changes={json.dumps(accept)}"]))
    assert snapshot(tmp_path) == before


WITHIN = {  # in the directory of a run
    "numbers": {"metrics.jsonl": '{"step": 1, "loss": 3.0, "mine": true}\n'},
    "numbers of another kind": {"metrics.jsonl": "my measurements\n"},
    "an adapter": {"adapter/mine": "x"},
    "a picture": {"norms.png": "my picture"},
    "stability": {"stability.png": "my picture"},
}


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize("name", WITHIN)
def test_a_users_file_where_a_run_writes_is_refused(tmp_path, name, accept):
    run_config = begun(tmp_path / "r", RunConfig(output=str(tmp_path / "r"), accept_changes=accept), WITHIN[name])
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="was not made by a run: move it, or choose another output="):
        locate(run_config)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, kind):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/.lock").symlink_to("../other") if kind == "a link" else os.mkfifo(tmp_path / "r/.lock")
    for refuse in (lambda: locate(RunConfig(output=str(tmp_path / "r"))), lambda: lock(tmp_path / "r").__enter__()):
        with pytest.raises(InputError, match="is no run directory|is not of a run"):
            refuse()
    assert (tmp_path / "other").read_text() == "mine"


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "r").symlink_to("nowhere")
    with pytest.raises(InputError, match="is a symbolic link to nothing: choose another output="):
        locate(RunConfig(output=str(tmp_path / "r")))


def test_a_run_of_before_the_mark_goes_on(tmp_path):
    run_config = begun(tmp_path / "r")
    path = tmp_path / "r/config.yaml"
    text = path.read_text()
    assert text.startswith(MARK) and text.count("#") == 1
    path.write_text(text.removeprefix(MARK))
    (tmp_path / "r/.lock").unlink()
    assert is_run(tmp_path / "r") and locate(run_config).path == tmp_path / "r"
    create(locate(run_config), run_config)
    assert path.read_text() == text and sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
    ]


def test_comments_that_a_user_adds_are_kept(tmp_path):
    run_config = begun(tmp_path / "r")
    path = tmp_path / "r/config.yaml"
    text = path.read_text() + "# the good one\n"
    path.write_text(text)
    create(locate(run_config), run_config, 7)
    assert (tmp_path / "r/config-until-7.yaml").read_text() == text and "good" not in path.read_text()


def test_changes_that_are_accepted_keep_the_numbers_of_before(tmp_path):
    run_config = begun(tmp_path / "r", files=ADAPTER | {"summary.json": "{}"})
    log = FIRST + '{"step": 1, "loss": 2.0}\n'
    (tmp_path / "r/metrics.jsonl").write_text(log)
    other = RunConfig(output=str(tmp_path / "r"), seed=5, accept_changes=True)
    create(locate(other), other)
    assert (tmp_path / "r/metrics-until-0.jsonl").read_text() == log
    assert config.load(RunConfig, tmp_path / "r/config-until-0.yaml") == run_config
    assert (tmp_path / "r/adapter-until-0/adapter_config.json").is_file() and (
        tmp_path / "r/summary-until-0.json"
    ).is_file()


def test_what_a_killed_run_left_goes_and_nothing_else(tmp_path):
    run_config = begun(tmp_path / "r")
    ours = [f".stablelora_jax-{digit * 16}.partial" for digit in "01"]
    put(tmp_path / "r", {f"{ours[0]}/x": "half", ours[1]: "half", ".stablelora_jax-mine.partial": "x", ".partial": "x"})
    create(locate(run_config), run_config)
    left = {path.name for path in (tmp_path / "r").iterdir()} - {"config.yaml", "metrics.jsonl", ".lock"}
    assert left == {".stablelora_jax-mine.partial", ".partial"}


@pytest.fixture
def logged(tmp_path):
    """A directory with the numbers of three steps, and nothing else of a run."""
    numbers = dict.fromkeys(
        ("loss", "learning_rate", *(f"norm_{x}{e}" for x in "ab" for e in ("", "_min", "_max"))), 1.0
    )
    for step in range(1, 4):
        append_record(tmp_path / "metrics.jsonl", {"step": step, **numbers})
    return tmp_path


@pytest.mark.parametrize("content", [b"MY PICTURE", b"", b"\x89PNG\r\n\x1a\n", "link", "another program's"])
@pytest.mark.parametrize("name", ["loss.png", "norms.png"])
def test_a_report_replaces_no_picture_of_a_users(logged, name, content):
    if content == "link":
        (logged / "target.png").write_bytes(b"x")
        (logged / name).symlink_to("target.png")
    elif isinstance(content, bytes):
        (logged / name).write_bytes(content)
    else:
        matplotlib.figure.Figure().savefig(logged / name)
    before = snapshot(logged)
    with pytest.raises(InputError, match=f"{name} was not drawn from a run: move it, or name another directory"):
        plots.report([logged])
    assert snapshot(logged) == before


def test_the_picture_of_several_replaces_none_of_a_users(logged, monkeypatch):
    (logged / "here").mkdir()
    monkeypatch.chdir(logged / "here")
    (logged / "here/losses.png").write_text("mine")
    before = snapshot(logged)
    with pytest.raises(InputError, match="losses.png was not drawn from a run"):
        plots.report([logged, logged])
    assert snapshot(logged) == before


def test_its_own_pictures_a_report_redraws(logged):
    for _ in range(2):
        plots.report([logged])
    assert is_picture(logged / "loss.png")
    matplotlib.figure.Figure().savefig(logged / "loss.png")
    assert not is_picture(logged / "loss.png")
    (logged / "config.yaml").write_text(MARK)
    assert is_picture(logged / "loss.png"), "in a run's own directory, what an earlier version has drawn"
