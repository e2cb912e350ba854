"""README and docs: commands parse, Python runs, tables agree with the code, links lead somewhere.

A fence that cannot run here has ``<!-- not run: REASON -->`` on the line before it. Of commands it is checked that the
subcommand exists, argparse takes the options, and the configuration loads; ``long`` runs a page of them.
"""

import argparse
import re
import runpy
import shlex
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import pytest
import yaml

import stablelora_jax
from stablelora_jax.cli import main as cli
from stablelora_jax.cli.data import with_path
from stablelora_jax.cli.train import load_config
from stablelora_jax.config.optimizer import OPTIMIZERS
from stablelora_jax.config.run import RunConfig
from stablelora_jax.lora.initializers import INITIALIZERS
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.rank_allocation import RANK_ALLOCATIONS
from tests.conftest import ROOT
from tests.test_layout import IMPORTS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- (not run: .*?) -->\n)?^ *```(\w+)(?: title=\"(.*?)\")?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL
)
ELSEWHERE = {"README.md": 2}  # the first fences of a page that other tests and .ci/run run
LOOPS = ("README.md", "docs/loop.md")  # Python that tests/test_readme.py runs


class Fence(NamedTuple):
    page: str
    reason: str  # why it is not run; empty where it is
    language: str
    title: str  # a file that the page tells to write
    text: str


def fences(page: Path) -> list[Fence]:
    name = page.relative_to(ROOT).as_posix()
    found = [Fence(name, *groups) for groups in FENCE.findall(page.read_text())]
    return found[ELSEWHERE.get(name, 0) :]


FENCES = [fence for page in PAGES for fence in fences(page)]


def commands(fence: Fence) -> list[list[str]]:
    """The words of each command."""
    lines = fence.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A directory with the files that a page tells to write, and rows."""
    monkeypatch.chdir(tmp_path)
    for fence in FENCES:
        if fence.title:
            path = tmp_path / fence.title
            path.parent.mkdir(exist_ok=True)
            path.write_text(fence.text)
    (tmp_path / "data" / "validation.jsonl").write_text((tmp_path / "data" / "train.jsonl").read_text())
    (tmp_path / "data" / "arc_easy").mkdir()
    row = '{"question": "Which is bigger?", "choices": ["bear", "ant"], "label": 0}\n'
    (tmp_path / "data" / "arc_easy" / "validation.jsonl").write_text(row * 8)
    return tmp_path


def parse(words: list[str]) -> None:
    """Parse a command as its program would; refuse one that is not ours."""
    program, *rest = words
    if program in ("python", "python3") and rest[0].startswith("experiments/"):
        name, rest = Path(rest[0]).stem, rest[1:]
        assert (ROOT / "experiments" / f"{name}.py").is_file(), words
        if name not in cli.COMMANDS:
            return
        rest = [name, *rest]
    else:
        assert program == "stablelora", f"{program} is not run by a test: say why above the fence"
    if rest[0] == "bench":
        return parse_bench(rest[1:])
    if "--help" in rest or "--list-configs" in rest:
        with pytest.raises(SystemExit) as end:
            cli.make_parser().parse_args(rest)
        assert end.value.code == 0, words
        return
    given = cli.make_parser().parse_args(rest)
    if rest[0] == "data":
        given.overrides = with_path(given.overrides)
    if hasattr(given, "config"):
        load_config(given)


def parse_bench(words: list[str]) -> None:
    if str(ROOT / "experiments") not in sys.path:
        sys.path.insert(0, str(ROOT / "experiments"))
    from importlib import import_module

    parser = argparse.ArgumentParser(allow_abbrev=False)
    import_module(f"bench.{words[0]}").add_options(parser)
    parser.parse_args(words[1:])


@pytest.mark.parametrize("page", sorted({f.page for f in FENCES if f.language in ("bash", "sh") and not f.reason}))
def test_commands_parse(page, reader):
    for fence in FENCES:
        if fence.page == page and fence.language in ("bash", "sh") and not fence.reason:
            for words in commands(fence):
                try:
                    parse(words)
                except SystemExit:
                    pytest.fail(f"argparse refuses {shlex.join(words)}")


PYTHON = sorted({f.page for f in FENCES if f.language == "python"} - {*LOOPS})


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page, reader):
    space: dict = {}
    for fence in FENCES:
        if fence.page != page or fence.language != "python" or fence.reason:
            continue
        if snippet := re.fullmatch(r'--8<-- "(examples/\w+\.py)"\n', fence.text):
            assert (ROOT / snippet[1]).is_file()  # tests/test_examples.py runs it
        else:
            exec(compile(fence.text, page, "exec"), space)


def test_every_example_is_shown():
    shown = re.findall(r'--8<-- "examples/(\w+)\.py"', (ROOT / "docs" / "examples.md").read_text())
    assert sorted(shown) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def test_reasons_are_given():
    assert all(len(fence.reason) > len("not run: ") for fence in FENCES if fence.reason)


@pytest.mark.long
def test_own_data_runs_as_printed(reader, capsys):
    """The whole page, on the package's base and with few steps."""
    changes = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(stablelora_jax.base_directory()),
        "max_length=512": "max_length=64",
    }
    for fence in FENCES:
        if fence.page == "docs/own-data.md" and fence.language == "bash":
            for line in commands(fence):
                words = [change(word, changes) for word in line[1:]]
                if "--config" not in words:
                    assert cli.main(words) == 0, (words, capsys.readouterr().err)


def change(word: str, changes: dict) -> str:
    for old, new in changes.items():
        word = word.replace(old, new)
    return word


def test_the_table_of_keys_is_that_of_run_config():
    """Where this fails, the message has the table."""
    rows = []
    default = RunConfig()
    for f in fields(RunConfig):
        value = getattr(default, f.name)
        if is_dataclass(value) or f.name == "distributed":
            continue
        shown = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
        shown = shown.removesuffix("\n").removesuffix("\n...")
        rows.append(f"| `{f.name}` | `{shown}` | {f.metadata['help']} |")
    page = (ROOT / "docs" / "configuration.md").read_text()
    table = page[page.index("## Top-level keys") : page.index("## Sections")]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows, "\n".join(rows)


def test_every_optimizer_has_its_row():
    rows = re.findall(r"^\| `(\w+)", (ROOT / "docs" / "optimizers.md").read_text(), re.MULTILINE)
    assert set(OPTIMIZERS) - {"adamw"} <= set(rows)


def test_every_member_of_the_axes_of_adapters_has_its_row():
    page = (ROOT / "docs" / "adapters.md").read_text()
    text = page[page.index("## Parametrisation") : page.index("What is refused")]
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    scalings = get_args(get_type_hints(LoraSpec)["scaling"])
    assert {name for cell in rows for name in re.findall(r"`(\w+)`", cell)} == {
        *PARAMETRIZATIONS,
        *INITIALIZERS,
        *scalings,
    }


def test_every_rank_allocation_has_its_row():
    page = (ROOT / "docs" / "adapters.md").read_text()
    rows = re.findall(r"^\| `(\w+)`", page[page.index("## Rank allocation") :], re.MULTILINE)
    assert rows == list(RANK_ALLOCATIONS)


def test_the_table_of_folders_is_that_of_the_layout():
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert {folder: " ".join(said.replace("nothing", "").split(", ")) for folder, said in rows} == IMPORTS


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    missing = [name for name in stablelora_jax.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]+))?\)")


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    plain = [
        re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)).strip().lower() for heading in headings
    ]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in LINK.findall(text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or path.suffix != ".md" or anchor in anchors(path), f"{target}#{anchor}"


def test_the_site_rewrites_links_that_leave_the_docs():
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py")) if _has_mkdocs() else pytest.skip("mkdocs is not installed")
    page = type("Page", (), {"file": type("File", (), {"src_uri": "results/speed-cpu.md"})})
    assert hooks["on_page_markdown"]("[a](curves-cpu/curves.md#x) [b](../../README.md)", page) == (
        "[a](curves-cpu/curves.md#x) [b](../../README.md)"
    )
    page.file.src_uri = "runs.md"
    text = "[a](../experiments/results/training-cpu.md#layouts) [b](../SECURITY.md) [c](loop.md)"
    assert hooks["on_page_markdown"](text, page) == "[a](results/training-cpu.md#layouts) [b](security.md) [c](loop.md)"


def _has_mkdocs() -> bool:
    from importlib.util import find_spec

    return find_spec("mkdocs") is not None
