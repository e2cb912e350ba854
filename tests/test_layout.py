"""The folders of the package: what may import what, heavy imports, the size of files."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stablelora_jax"
IMPORTS = {  # a folder imports from those named here, and from nothing else of the package
    "utils": "",
    "quantization": "utils",
    "parallel": "utils",
    "models": "utils quantization",
    "lora": "utils quantization",
    "optimizers": "utils lora",
    "objectives": "utils",
    "rank_allocation": "utils lora",
    "config": "utils lora optimizers objectives rank_allocation",
    "data": "utils config",
    "interop": "utils quantization models lora",
    "training": "utils parallel models lora optimizers data",
    "generation": "utils models lora data",
    "evaluation": "utils parallel models interop data training generation",
    "runs": "utils quantization parallel models lora optimizers rank_allocation config interop data training "
    "evaluation",
    "jobs": "utils parallel lora optimizers config data training runs",
    "studies": "utils lora optimizers config interop data training evaluation runs jobs",
    "cli": "utils config data interop generation evaluation runs jobs studies",
}
AXES = ["lora/parametrizations", "lora/initializers"]
LOOSE = {"__init__.py", "__main__.py", "py.typed", "assets"}  # of the top level
LINES = 350
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "gguf",
    "safetensors",
    "matplotlib",
    "tensorboardX",
    "orbax",
    "huggingface_hub",
    "ray",
    "optuna",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path, nodes=None):
    for node in ast.walk(ast.parse(path.read_text())) if nodes is None else nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from [
                f"{node.module}.{a.name}" if node.module == "stablelora_jax" else node.module for a in node.names
            ]
        elif isinstance(node, ast.Import):
            yield from [alias.name for alias in node.names]


def used(folder: str) -> set[str]:
    """Which other folders the files of ``folder`` import from."""
    names = {name for path in (PACKAGE / folder).rglob("*.py") for name in imports(path)}
    return {name.split(".")[1] for name in names if name.startswith("stablelora_jax.")} - {folder}


def test_folders_and_loose_files():
    left_behind = lambda path: path.is_dir() and path.name != "assets" and not list(path.rglob("*.py"))  # by a pull
    assert {path.name for path in PACKAGE.iterdir() if not left_behind(path)} == {*IMPORTS, *LOOSE}


@pytest.mark.parametrize("folder", IMPORTS)
def test_imports_go_one_way(folder):
    allowed, order = IMPORTS[folder].split(), list(IMPORTS)
    assert used(folder) == set(allowed)
    assert all(order.index(other) < order.index(folder) for other in allowed)


@pytest.mark.parametrize("folder", IMPORTS)
def test_each_folder_says_what_it_imports(folder):
    said = re.search(
        r"^Imports:? (.*?)\.( |$)", import_module(f"stablelora_jax.{folder}").__doc__, re.MULTILINE | re.DOTALL
    )[1]
    names = " ".join(said.replace("nothing of the package", "").split())
    assert set(filter(None, names.split(", "))) == set(IMPORTS[folder].split())


def test_lora_and_models_are_strangers():
    assert "models" not in used("lora") and "lora" not in used("models")


@pytest.mark.parametrize("axis", AXES)
def test_members_of_an_axis_do_not_know_the_other_axes(axis):
    names = {name for path in (PACKAGE / axis).rglob("*.py") for name in imports(path)}
    others = [f"stablelora_jax.{other.replace('/', '.')}" for other in AXES if other != axis]
    assert not [name for name in names if any(name.startswith(other) for other in others)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_where_they_are_needed(path):
    top = ast.parse(path.read_text()).body
    assert not {name.split(".")[0] for name in imports(path, top)} & HEAVY


def test_nothing_needs_torch():
    named = [path.name for path in FILES for name in imports(path) if name.split(".")[0] in ("torch", "peft")]
    assert named == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= LINES and path.read_text().startswith('"""')
