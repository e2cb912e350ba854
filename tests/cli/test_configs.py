"""Configurations by name: those of the repository, from any directory."""

from pathlib import Path

import pytest

from stablelora_jax.cli import configs
from tests.conftest import ROOT

FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def test_every_file_of_the_repository_has_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = [configs.find(name) for name in configs.names()]
    assert sorted(map(Path, found)) == FILES and len(FILES) > 20
    assert configs.find("paper/llama-3.2-1b-merged_qa.yaml") == configs.find("paper/llama-3.2-1b-merged_qa")
    assert configs.names()[0] == configs.DEFAULT


def test_a_file_is_taken_before_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("default").write_text("seed: 3")
    assert configs.find("default") == "default"
    Path("default").unlink()
    Path("default").mkdir()
    assert Path(configs.find("default")) == ROOT / "configs" / "default.yaml"


@pytest.mark.parametrize("name", ["/dev/null", "mine.yaml", "a/b.yml"])
def test_what_is_no_name_is_left_to_the_reader(name):
    assert configs.find(name) == name


def test_a_file_system_without_links(monkeypatch, tmp_path):
    (tmp_path / "configs").write_text("../../configs")  # as git writes a link there
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "configs")
    assert Path(configs.find("default")) == ROOT / "configs" / "default.yaml"
