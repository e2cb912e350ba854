"""The Python of README and docs/loop.md runs as printed, one block after another, in one namespace."""

import importlib.util
import re

import jax
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.helpers import long

TEXT = (ROOT / "README.md").read_text()
PAGES = {
    name: re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S) for name in ("README.md", "docs/loop.md")
}


def test_exactly_two_shell_commands_come_before_anything_else():
    fences = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)
    assert [kind for kind, _ in fences[:2]] == ["bash", "bash"] and "bash" not in [kind for kind, _ in fences[2:]]
    assert "experiments/train.py" in fences[0][1] and "pytest" in fences[1][1]
    before = TEXT[: TEXT.index("```bash")]
    assert before.strip() == "# stablelora_jax"
    between = TEXT.split("```")[2]
    assert between.strip() == ""


@pytest.mark.parametrize("page", PAGES)
def test_the_loop_has_ten_lines(page):
    loop = PAGES[page][0][PAGES[page][0].index("@jax.jit") :].strip().splitlines()
    assert len(loop) == 10


@pytest.mark.parametrize("page", ["README.md", long("docs/loop.md")])
def test_the_examples_run_as_printed(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    losses = []
    assert page == "README.md" or any("open_manager" in block for block in PAGES[page])
    for block in PAGES[page]:
        if "import equinox" in block and importlib.util.find_spec("equinox") is None:
            continue
        exec(compile(block, page, "exec"), space)
        losses.append(space["value"])
        if "open_manager" in block:  # once more, as after a kill: nothing is left to do
            before = jax.tree.map(np.asarray, (space["adapters"], space["opt_state"]))
            exec(compile(block, page, "exec"), space)
            again = space["adapters"], space["opt_state"]
            assert space["first"] == 20 and space["checkpoint"].steps("checkpoints") == [10, 20]
            assert jax.tree.structure(again) == jax.tree.structure(before)
            assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, again)), strict=True))
    assert "model.layers.0.self_attn.q_proj" in capsys.readouterr().out
    assert page != "README.md" or space["y"].shape == (2, 5, 16)
    first = space["lora"].apply({"params": space["params"]}, space["tokens"])
    assert not np.array_equal(
        first, space["lora"].apply({"params": space["params"], "lora": space["adapters"]}, space["tokens"])
    )


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 200
