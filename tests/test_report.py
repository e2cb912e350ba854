"""Pictures from metrics.jsonl alone."""

from stablelora_jax import report
from stablelora_jax.metrics import append_record


def test_two_pictures(tmp_path):
    assert report.draw(tmp_path) == []
    for step in range(1, 6):
        norms = {f"norm_{x}{end}": 1.0 / step for x in "ab" for end in ("", "_min", "_max")}
        record = {"step": step, "loss": 2.0 / step, "learning_rate": 1e-3, "shrinking": 2, **norms}
        append_record(
            tmp_path / "metrics.jsonl", record | ({"stopped": ["model.layers.0.q_proj"]} if step == 3 else {})
        )
    append_record(tmp_path / "metrics.jsonl", {"step": 5, "validation": {"acc": 1.0}})
    for picture in report.draw(tmp_path):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000
