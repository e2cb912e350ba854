"""The command as a whole: what it shows without jax, where its words go, and how it refuses them."""

import io
import json
import subprocess
import sys
from importlib import metadata

import pytest

from stablelora_jax import base_directory
from stablelora_jax.cli import bench, main
from tests.conftest import ROOT

LIGHT = """
import sys
from stablelora_jax.cli.main import main
for words in (["--help"], ["--version"], ["export", "--help"], ["train", "--list-configs"], ["generate"]):
    try:
        main(words)
    except SystemExit:
        pass
print([name for name in ("jax", "flax", "numpy", "yaml", "transformers", "tqdm") if name in sys.modules])
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert all(f"\n    {name} " in done.stdout for name in main.COMMANDS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_fits_a_screen(stablelora, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = stablelora(name, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: stablelora {name} ")
    assert len(out.splitlines()) <= 54 and max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("key,shown", [("lora", "lora.rank_pattern"), ("optimizer.lora_rite", "escape")])
def test_help_leads_on(stablelora, key, shown):
    assert f"\n  {key.split('.')[0]} " in stablelora("train", "--help")[1]
    code, out, err = stablelora("train", "--help", key)
    assert (code, err) == (0, "") and shown in out and "\n  steps " not in out
    code, out, err = stablelora("train", "--help", f"{key}x")
    assert (code, out, err.count("\n")) == (2, "", 1) and f"did you mean {key}" in err


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m stablelora_jax train --list-configs | true"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) in ((0, ""), (1, ""))


def test_version(stablelora):
    assert stablelora("--version") == (0, f"stablelora_jax {metadata.version('stablelora-jax')}\n", "")


BASE = str(base_directory())
BAD = {
    "": "required: COMMAND",
    "trian": "invalid choice: 'trian'",
    "train --config nope": "there is no configuration 'nope': 'stablelora train --list-configs' lists all",
    "train --config smollm-135m": "did you mean smollm2-135m-arc-easy?",
    "train --config arc_chal": "did you mean paper/llama-3.2-1b-arc_challenge, ",
    "train --config no/such.yaml": "error: no/such.yaml: No such file",
    "train --config empty": "error: empty: Is a directory",
    "train lora.rnk=4": "lora.rnk is not a key (did you mean lora.rank?)",
    "evaluate BASE": "required: --tasks",
    "evaluate BASE --tasks arc_esay": "no task 'arc_esay'; the tasks are hellaswag, ",
    "evaluate BASE --tasks jsonl": "--tasks jsonl needs --data DIR",
    "evaluate BASE --tasks jsonl --data nowhere": "error: nowhere does not exist; a directory with ",
    "evaluate BASE --tasks jsonl --data . --split": "argument --split: expected one argument",
    "evaluate BASE --tasks jsonl --data . --limit 0": "limit must be positive, not 0",
    "evaluate BASE --tasks jsonl --data . --fields {x:": "error: fields={x:: not valid YAML",
    "evaluate BASE --tasks jsonl --data . --fields {}": "row 1: there is no column 'prompt'; the columns are q, a. Say "
    "which is which with --fields '{prompt: COLUMN, completion: COLUMN}'\n",
    "evaluate BASE --tasks jsonl --data . --fields {'x':'q'}": "error: --fields: x is not read for kind completion",
    "evaluate BASE --tasks jsonl --data chats --kind chat": "has no chat template: give --no-chat\n",
    "evaluate BASE --tasks text --data . --kind chat": "--kind, --fields and --chat describe rows of your own",
    "generate BASE": "there is no prompt",
    "export nowhere --to peft": "error: nowhere",
    "export nowhere --to onnx": "invalid choice: 'onnx'",
    "report nowhere": "error: there is no run directory nowhere",
    "data task.name=arc": "task.name wants",
    "data --samples -1": "--samples must not be negative, not -1",
    "bench": "error: the following arguments are required: command",
    "bench train --steps 0": "error: --steps must be at least 1, not 0",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_words_are_refused_with_exit_code_2(stablelora, monkeypatch, tmp_path, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (tmp_path / "empty").mkdir()
    (tmp_path / "validation.jsonl").write_text('{"q": "x", "a": "y"}\n')
    (tmp_path / "chats").mkdir()
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    (tmp_path / "chats" / "validation.jsonl").write_text(json.dumps({"messages": turns}))
    before = sorted(tmp_path.iterdir())
    code, out, err = stablelora(*line.replace("BASE", BASE).split())
    assert code == 2 and out == "" and BAD[line] in err and sorted(tmp_path.iterdir()) == before
    assert err.count("\n") == 1 or err.startswith("usage: stablelora")


def test_without_its_source_tree_bench_says_where_it_is(stablelora, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "EXPERIMENTS", tmp_path)
    code, out, err = stablelora("bench", "train", "--help")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: the benchmarks are not in the wheel")


def test_bench_has_its_own_help(stablelora):
    code, out, _ = stablelora("bench", "train", "--help")
    assert code == 0 and out.startswith("usage: stablelora bench train ")


def test_completion(stablelora):
    pytest.importorskip("shtab")
    code, out, _ = stablelora("--print-completion", "bash")
    assert code == 0 and "complete " in out and "--dry-run" in out
    assert stablelora("--print-completion", "cmd")[2].endswith("not 'cmd'\n")


def test_completion_without_shtab(stablelora, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert stablelora("--print-completion", "bash") == (
        2,
        "",
        "error: --print-completion needs shtab: pip install shtab\n",
    )


def test_export_offers_what_there_is():
    from stablelora_jax.cli import export
    from stablelora_jax.interop.export import KINDS

    assert export.KINDS == KINDS
