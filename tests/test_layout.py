"""The floors of the house: a module imports only from its own floor and below; axes never import each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stablelora_jax"
FLOORS = [
    {"errors", "checked", "files", "outputs", "expressions", "patterns", "tree", "config"} | {"safe_yaml"},
    {"spec", "adapter", "lowrank", "quantize"},
    {"parametrize", "initialize", "optimize"},
    {"sites", "full", "contraction", "transform", "intercept", "stability", "describe", "models", "combine", "bank"}
    | {"fingerprint", "freeze"},
    {"optimizer_config", "schedule_config", "parallel_config", "run_config", "tasks", "data", "losses", "objective"}
    | {"metrics", "sampling", "checkpoint", "interop", "interrupt", "parallel"},
    {"run_files", "run_directory", "log", "trackers", "build", "warm_start", "train", "evaluate", "decode", "generate"}
    | {"memory", "flops", "summary", "likelihood", "until", "measure", "validate", "selection", "curves"},
    {"prepare", "loop", "run", "export", "attach", "harness", "dry_run", "command", "report", "compile_cache"},
]
AXES = FLOORS[2]
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
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path, nodes=None):
    for node in ast.walk(ast.parse(path.read_text())) if nodes is None else nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from [
                f"{node.module}.{a.name}" if node.module == "stablelora_jax" else node.module for a in node.names
            ]
        elif isinstance(node, ast.Import):
            yield from [alias.name for alias in node.names]


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def own_room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [p for p in FILES if own_room(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_floors(path):
    mine = own_room(path)
    used = {room(name) for name in imports(path) if name.startswith("stablelora_jax.")} - {mine}
    for other in used:
        assert floor(other) <= floor(mine), f"{mine} imports {other} from a higher floor"
        assert not (mine in AXES and other in AXES), f"the axes {mine} and {other} must not know each other"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_where_they_are_needed(path):
    top = ast.parse(path.read_text()).body
    assert not {name.split(".")[0] for name in imports(path, top)} & HEAVY


def test_nothing_needs_torch():
    named = [path.name for path in FILES for name in imports(path) if name.split(".")[0] in ("torch", "peft")]
    assert named == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 350 and path.read_text().startswith('"""')
