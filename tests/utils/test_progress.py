"""Progress where stderr is no terminal: a line for each further 10 % or minute, none in the first 10 seconds."""

import sys

from stablelora_jax.utils.progress import ProgressLines, open_progress, track


def shares(seconds_each, total, capsys, initial=0):
    """(step, percent) of the lines of a loop whose steps take so long."""
    now = [0.0]
    progress = ProgressLines(total, "train", "steps", initial, clock=lambda: now[0])
    for _ in range(total - initial):
        now[0] += seconds_each
        progress.set_postfix(loss="0.5", refresh=False)
        progress.update()
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("train: ") and line.endswith(", loss=0.5") for line in lines)
    return [int(line.split()[1]) for line in lines], lines


def test_a_line_every_ten_percent(capsys):
    assert shares(1.0, 200, capsys)[0] == list(range(20, 200, 20))
    assert shares(1.0, 200, capsys, initial=100)[0] == list(range(120, 200, 20))


def test_a_line_every_minute(capsys):
    found, lines = shares(30.0, 100, capsys)
    assert found == list(range(2, 100, 2))
    assert lines[4] == "train: 10 of 100 steps (10 %), 5 min elapsed, 45 min left, loss=0.5"


def test_the_first_step_which_compiles_tells_nothing_of_the_time_left(capsys):
    now = [0.0]
    progress = ProgressLines(1000, "train", "steps", clock=lambda: now[0])
    for seconds in (100.0, 0.5, 0.4, *[0.2] * 97):
        now[0] += seconds
        progress.update()
    assert capsys.readouterr().err.splitlines() == [
        "train: 1 of 1000 steps (0 %), 2 min elapsed",
        "train: 100 of 1000 steps (10 %), 2 min elapsed, 3 min left",
    ]


def test_no_line_for_what_is_quick(capsys):
    assert shares(0.09, 100, capsys)[0] == []
    assert shares(0.5, 40, capsys)[0] == [20, 24, 28, 32, 36], "the first 10 seconds are silent"


def test_a_bar_on_a_terminal_alone(monkeypatch, capsys):
    assert list(track([3, 1, 2], "likelihood", "batches")) == [3, 1, 2] and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(track([3, 1], "likelihood", "batches")) == [3, 1] and "likelihood" in capsys.readouterr().err
    assert list(track([3, 1], "likelihood", "batches", hidden=True)) == [3, 1] and capsys.readouterr().err == ""
    bar = open_progress(9, "train", "steps", initial=4)
    bar.close()
    assert "4/9" in capsys.readouterr().err
