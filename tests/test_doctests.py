"""The examples in the package's docstrings run as printed."""

import doctest
import importlib

import pytest

from tests.conftest import ROOT

FILES = [path for path in sorted((ROOT / "stablelora_jax").rglob("*.py")) if ">>> " in path.read_text()]
NAMES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]


@pytest.mark.parametrize("name", NAMES)
def test_examples_run_as_printed(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert found.attempted and not found.failed
