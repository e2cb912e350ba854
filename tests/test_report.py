"""Pictures from metrics.jsonl alone."""

import numpy as np

from stablelora_jax import report
from stablelora_jax.metrics import append_record

PNG = b"\x89PNG\r\n\x1a\n"


def test_two_pictures(tmp_path):
    assert report.draw(tmp_path) == []
    for step in range(1, 6):
        norms = {f"norm_{x}{end}": 1.0 / step for x in "ab" for end in ("", "_min", "_max")}
        record = {"step": step, "loss": 2.0 / step, "learning_rate": 1e-3, "shrinking": 2, **norms}
        append_record(
            tmp_path / "metrics.jsonl", record | ({"stopped": ["model.layers.0.q_proj"]} if step == 3 else {})
        )
    append_record(tmp_path / "metrics.jsonl", {"step": 5, "validation": {"acc": 1.0}})
    pictures = report.draw(tmp_path)
    assert [picture.name for picture in pictures] == ["loss.png", "norms.png"]
    for picture in pictures:
        assert picture.read_bytes()[:8] == PNG and picture.stat().st_size > 10_000


def test_a_third_picture_where_a_record_has_the_terms(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    fields, pairs = ("delta1", "delta2", "delta3", "shrink", "a", "b"), ("layers.0.q_proj", "layers.1.q_proj")
    for step in range(1, 6):
        norms = {f"norm_{x}{end}": 1.0 / step for x in "ab" for end in ("", "_min", "_max")}
        record = {"step": step, "loss": 2.0 / step, "learning_rate": 1e-3, "shrinking": 2, **norms}
        terms = {name: {field: step * 4.0**i for field in fields} for i, name in enumerate(pairs)}
        for pair in terms.values():
            pair |= {"shrink": 0.0} | ({"delta2": 0.0} if step == 2 else {})  # nothing that a log axis can show
        append_record(tmp_path / "metrics.jsonl", record | ({"stability": terms} if step % 2 == 0 else {}))
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    picture = report.draw(tmp_path)[-1]
    assert picture.name == "stability.png" and picture.read_bytes()[:8] == PNG and picture.stat().st_size > 10_000
    upper, lower = drawn[-1].axes
    lines = {line.get_label().split(" = ")[0]: line.get_xydata().tolist() for line in upper.lines}
    lines |= {line.get_label(): line.get_xydata().tolist() for line in lower.lines}
    np.testing.assert_allclose(lines["delta1"], [[2, 4], [4, 8]])  # the geometric mean of 1 and 4 times the step
    np.testing.assert_allclose(lines["delta2"], [[4, 8]])
    assert lines.keys() == {"delta1", "delta2", "delta3", "||A|| / in", "||B|| / out"}
    low, high = upper.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == (2, 16) and upper.get_yscale() == lower.get_yscale() == "log"
