"""The public names: each is imported on first use, and type checkers read the same list."""

import ast
from importlib import import_module, metadata
from pathlib import Path

import stablelora_jax
from stablelora_jax.utils.errors import InputError

SOURCE = ast.parse(Path(stablelora_jax.__file__).read_text())


def test_type_checkers_read_the_same_names():
    block = next(node for node in SOURCE.body if isinstance(node, ast.If))
    said = {
        alias.name: (n.module, alias.asname) for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names
    }
    assert said == {name: (f"stablelora_jax.{home}", name) for name, home in stablelora_jax._HOME.items()}


def test_each_name_is_what_its_module_has():
    for name, home in stablelora_jax._HOME.items():
        assert name in dir(stablelora_jax) and name in stablelora_jax.__all__
        found, module = getattr(stablelora_jax, name), import_module(f"stablelora_jax.{home}")
        assert found is (import_module(f"{module.__name__}.{name}") if name == "checkpoint" else getattr(module, name))
    assert stablelora_jax.InputError is InputError
    folders = {path.parent.name for path in Path(stablelora_jax.__file__).parent.glob("*/__init__.py")}
    assert set(stablelora_jax._FOLDERS.split()) == folders
    assert stablelora_jax.optimizers.__name__ == "stablelora_jax.optimizers"


def test_no_other_name(monkeypatch):
    assert not hasattr(stablelora_jax, "nothing")
    assert stablelora_jax.__version__ == metadata.version("stablelora-jax")
    monkeypatch.delitem(vars(stablelora_jax), "__version__")
    monkeypatch.setattr(metadata, "version", lambda name: (_ for _ in ()).throw(metadata.PackageNotFoundError(name)))
    assert stablelora_jax.__version__ == "0+unknown"
    del stablelora_jax.__version__
