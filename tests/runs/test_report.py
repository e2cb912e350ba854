"""The page of runs: one file with everything in it, right for runs in any state, and safe against what they hold."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

from stablelora_jax import config
from stablelora_jax.config.optimizer import CONFIGS
from stablelora_jax.config.run import RunConfig
from stablelora_jax.runs.files import MARK
from stablelora_jax.runs.records import append_record
from stablelora_jax.runs.report import write_page
from stablelora_jax.utils.errors import InputError, RunError

EVIL = "<script>alert('x')</script> & \"q\" {{ 7 * 7 }} $x$"
VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page; fails where they do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def said(self, *tags):
        return [text for tag, text in self.texts if tag in tags and text]

    @property
    def text(self):
        return " ".join(text for _, text in self.texts if text)


def write(directory, logged=3, summary=None, evaluations=True, stability=False, **keys):
    """A run directory as :func:`stablelora_jax.runs.run.run` leaves it, without training."""
    directory.mkdir(parents=True)
    chosen = RunConfig(output=str(directory), **{"steps": 3, **keys})
    (directory / "config.yaml").write_text(MARK + config.dump(chosen))
    log = directory / "metrics.jsonl"
    append_record(log, {"step": 0, "data": {"rows": 10, "loss_tokens": 20, "digest": EVIL}})
    if evaluations:
        append_record(log, {"step": 0, "validation": {"loss": 2.5, "acc": 0.25, "questions": 4, "answers": [0] * 4}})
    for step in range(1, logged + 1):
        norms = {f"norm_{x}{end}": 1.0 / step for x in "ab" for end in ("", "_min", "_max")}
        record = {"step": step, "loss": 2.0 / step, "learning_rate": 1e-3, "shrinking": 2, **norms}
        ratios = {f"model.layers.{i}.q_proj": 4.0 * (i + 1) / step for i in range(2)}
        terms = {name: dict.fromkeys(("delta1", "delta2", "delta3", "shrink", "a", "b"), 0.5) for name in ratios}
        record |= {"stop_ratios": ratios} | ({"stability": terms} if stability else {})
        append_record(log, record | ({"skipped": True} if step == 2 else {}))
    if evaluations and summary:
        append_record(log, {"step": logged, "validation": {"loss": 0.5, "acc": 0.75, "questions": 4}})
    if summary:
        (directory / "summary.json").write_text(json.dumps({"steps": logged, "stopped_early": False, **summary}))
    return directory


FINISHED = {
    "loss_last_10": 1.25,
    "minutes": 1.5,
    "devices": "1 x TPU v5",
    "jax": "0.10.2",
    "samples": [{"prompt": f"Which?\n{EVIL}", "right": "ant", "before": "bear", "after": "ant"}],
    "environment": {"python": "3.11.7"},
}


def parsed(*runs, output):
    assert write_page(list(runs), output) == output
    return Page(output.read_text())


def test_a_finished_run_has_every_section(tmp_path):
    optimizer = CONFIGS["stable_lora"](shrink_ratio=2e-3)
    run = write(tmp_path / "run", summary=FINISHED, stability=True, optimizer=optimizer)
    os.utime(run / "summary.json", (1795860000, 1795860000))
    page = parsed(run, output=tmp_path / "new" / "report.html")
    assert page.said("h1") == ["Run run"] and "finished, 3 steps" in page.text
    sections = ["Evaluations", "Sample answers", "Configuration", "Environment", "Training data"]
    assert page.said("h3")[-5:] == sections
    assert page.said("h3")[:-5] == [
        "Loss on the answer tokens",
        "Accuracy on held-out questions",
        "The ratio that ends the shrinking of A",
        "Norms of A and B",
        "What a step changes at the modules' outputs (RMS)",
        "Norms over widths",
    ]
    assert page.tags.count("figure") == page.tags.count("figcaption") == 6
    facts = page.said("dt", "dd")
    for fact in ("1.25", "0.5", "2.5 before training", "75.0 %", "25.0 % before training", "0 of 2", "1.5"):
        assert fact in facts or fact.replace(" %", "\N{NO-BREAK SPACE}%") in facts, fact
    assert "None of the 2 pairs has reached 1 so far" in page.text and "not finite: step 2." in page.text
    assert "✗ wrong" in page.text and "✓ right" in page.text
    for known in ("1 x TPU v5", "2026-11-28 10:00:00", "3.11.7", "not saved yet", "loss tokens"):
        assert known in page.text, known
    assert "0.002" in page.said("strong") and "0.0005" in page.text, "what differs, beside its default"
    assert "output" not in page.said("th") and "null" not in page.said("strong")
    assert page.tags.count("table") == page.tags.count("caption")


def test_the_page_needs_nothing_else_and_every_chart_has_a_name(tmp_path):
    runs = [write(tmp_path / name, summary=FINISHED, seed=i) for i, name in enumerate("ab")]
    page = parsed(*runs, output=tmp_path / "report.html")
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(set(ids)) == len(ids)
    for tag, key, value in page.attributes:
        assert not key.startswith("on") and key not in ("src", "srcset", "action"), (tag, key)
        if key.endswith("href"):
            assert value.startswith("#") and value[1:] in ids, value
        for target in re.findall(r"url\((.*?)\)", value or ""):
            assert target.startswith("#") and target[1:] in ids, target
        if key == "aria-labelledby":
            assert value in ids, value
    text = (tmp_path / "report.html").read_text()
    assert "http" not in text and "@import" not in text and "url(" not in text.split("</style>")[0]
    assert page.attributes.count(("svg", "role", "img")) == page.tags.count("figure") == 10
    assert text.count("aria-labelledby") == 10 + 3, "charts and sections"
    left = re.findall(r"(?:fill|stroke|color): ?(#\w+)", text.split("</style>")[1])
    assert set(left) <= {"#000000", "#ffffff"}, "every colour is the page's, light or dark"


def test_what_a_run_holds_is_text_alone(tmp_path):
    run = write(tmp_path / "a", summary=FINISHED, init_from=EVIL)
    other = write(tmp_path / "b", summary=FINISHED, init_from=EVIL + "2")
    page = parsed(run, other, output=tmp_path / "report.html")
    assert "script" not in page.tags and "49" not in page.said("h1", "h2", "th", "td", "p")
    for tag in ("p", "td", "h2", "a", "span"):
        assert any(EVIL in text for text in page.said(tag)), tag


@pytest.mark.parametrize("state", ["begun", "half", "no evaluation", "no config"])
def test_a_run_that_is_not_finished(tmp_path, state):
    run = write(tmp_path / "r", 0 if state == "begun" else 2, evaluations=state != "no evaluation")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    if state == "no config":
        (run / "config.yaml").unlink()
    page = parsed(run, output=tmp_path / "report.html")
    done = "0 of 3" if state == "begun" else "2" if state == "no config" else "2 of 3"
    assert f"not finished: {done} steps so far" in page.text
    assert ("No step has been logged yet." in page.text) == (state == "begun")
    assert ("There is no evaluation." in page.text) == (state == "no evaluation")
    assert ("The directory has no config.yaml." in page.text) == (state == "no config")
    assert "They are recorded when the run ends." in page.text and "nan" not in page.text.lower().split()


def test_several_runs_side_by_side(tmp_path):
    stable = write(tmp_path / "stable", summary=FINISHED)
    adamw = write(tmp_path / "adamw", summary=FINISHED | {"stopped_early": True}, optimizer=CONFIGS["adamw"]())
    begun = write(tmp_path / "begun", 0, seed=7)
    page = parsed(stable, adamw, begun, output=tmp_path / "report.html")
    assert page.said("h1") == ["3 runs"] and page.said("h2")[0] == "Side by side"
    names = page.said("h2")[1:]
    assert names[0].startswith("1: optimizer.name=stable_lora") and "adamw" in names[1] and "seed=7" in names[2]
    assert {"Loss of the runs"} <= set(page.said("h3")) and "stopped early, at step 3 of 3" in page.text
    rows = page.said("th", "td", "wbr")
    at = rows.index("Held-out loss")
    assert rows[at : at + 4] == [
        "Held-out loss", "0.5 (2.5 before training)", "0.5 (2.5 before training)", "2.5 (before training)",
    ]  # fmt: skip
    assert rows[rows.index("seed") : rows.index("seed") + 4] == ["seed", "0", "0", "7"]


def test_only_its_own_page_is_replaced(tmp_path):
    run, page = write(tmp_path / "run"), tmp_path / "report.html"
    write_page([run], page)
    before = page.read_text()
    append_record(run / "metrics.jsonl", {"step": 3, "loss": 7.0, "learning_rate": 0.1})
    assert write_page([run], page).read_text() != before and not list(tmp_path.glob(".*"))
    page.write_text("<!doctype html>\n<p>mine</p>")
    with pytest.raises(InputError, match="report.html is no page of runs: move it"):
        write_page([run], page)
    assert page.read_text() == "<!doctype html>\n<p>mine</p>"
    (tmp_path / "link").symlink_to(page)
    for place, message in ((tmp_path / "link", "a symbolic link"), (run, "is a directory")):
        with pytest.raises(InputError, match=message):
            write_page([run], place)
    with pytest.raises(RunError, match="cannot write"):
        write_page([run], page / "x.html")


def test_what_is_no_run_is_one_line(tmp_path):
    run = write(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    for name, message in (
        ("nowhere", "there is no run directory"),
        ("empty", "has no metrics.jsonl: it is no run directory"),
        ("foreign", "holds no record of a run"),
    ):
        with pytest.raises(InputError, match=message):
            write_page([run, tmp_path / name], tmp_path / "report.html")
    with pytest.raises(InputError, match="at least one run"):
        write_page([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
