"""Records that survive a crash."""

import json

import numpy as np
import pytest

from stablelora_jax.runs.records import append_record, each_record, keep_records_until
from stablelora_jax.utils.errors import InputError


def test_records_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(each_record(path)) == []
    keep_records_until(path, 3)
    assert not path.exists()
    for step in range(5):
        append_record(path, {"step": step, "loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in list(each_record(path))] == [0, 1, 2, 3, 4]
    keep_records_until(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
    "tail,kept",
    [
        (b'{"step": 2, "lo', 2),  # a kill in the middle of a line
        (b'{"step": 2, "loss": 0.1}', 3),  # and just before its end: the next line must not be glued to it
        (b"\x00\x00\xff\n", 2),
        (b"[1]\n", 2),
        (b'{"step": 2, "loss": 0.1}\n{"step": 3, "loss": 0.1}\n', 3),
    ],
)
def test_what_a_resumed_run_will_write_again_is_dropped(tmp_path, tail, kept):
    path, whole = tmp_path / "metrics.jsonl", b'{"step": 0,  "loss": 1e0}\n{"step": 1, "loss": 0.30000000000000004}\n'
    path.write_bytes(whole + tail)
    keep_records_until(path, 2)
    append_record(path, {"step": 9})
    assert path.read_bytes().startswith(whole), "what stays keeps its bytes"
    lines = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert lines == [*range(kept), 9] and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_file_is_rewritten_only_where_something_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 1})
    before = path.stat().st_ino
    keep_records_until(path, 1)
    assert path.stat().st_ino == before
    keep_records_until(path, 0)
    assert path.stat().st_ino != before and path.read_bytes() == b""


def test_floats_round_trip_and_what_is_not_finite_is_null(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "metrics.jsonl"
    singles = [float(x) for x in rng.normal(size=50).astype(np.float32) * 10.0 ** rng.integers(-30, 30, 50)]
    append_record(path, {"step": 1, "all": singles, "deep": {"a": [np.nan, (np.inf, 1)]}, "loss": -np.inf, "ok": True})
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    (record,) = list(each_record(path))
    assert record == {"step": 1, "all": singles, "deep": {"a": [None, [None, 1]]}, "loss": None, "ok": True}


@pytest.mark.parametrize("ratios", [[1.0], {"q_proj": "1"}, {"q_proj": True}])
def test_ratios_that_no_run_writes_are_refused_by_line_and_key(tmp_path, ratios):
    append_record(tmp_path / "metrics.jsonl", {"step": 1, "stop_ratios": {"q_proj": None, "v_proj": 1.5}})
    append_record(tmp_path / "metrics.jsonl", {"step": 2, "stop_ratios": ratios})
    with pytest.raises(InputError, match="line 2: stop_ratios must be a mapping"):
        list(each_record(tmp_path / "metrics.jsonl"))
