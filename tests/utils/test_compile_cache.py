"""Where compiled programs are kept, what turns it off, and that a second process finds them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from stablelora_jax.utils import compile_cache

TOY = """
import jax, jax.numpy as jnp
from stablelora_jax.utils import compile_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
print(compile_cache.enable())
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((5, 5))).shape, len(hits))
"""
OURS = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def run(code, **changes):
    """What ``code`` prints in a process of its own, whose environment says nothing of caches but ``changes``."""
    own = {name: value for name, value in os.environ.items() if name not in OURS} | changes
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def files(directory):
    return sorted(path.name for path in Path(directory).rglob("*") if path.is_file() and "-atime" not in path.name)


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    first = run(TOY, XDG_CACHE_HOME=str(tmp_path))
    directory = Path(first[0])
    assert directory.parent == tmp_path / "stablelora_jax" / "compiled" and first[1] == "(5, 5) 0"
    kept = files(directory)
    assert kept
    second = run(TOY, XDG_CACHE_HOME=str(tmp_path))
    assert second[0] == first[0] and int(second[1].split()[-1]) > 0 and files(directory) == kept


ENABLE = "from stablelora_jax.utils import compile_cache; print(compile_cache.enable())"


def test_jax_s_own_switches_come_first(tmp_path):
    own, home = str(tmp_path / "own"), str(tmp_path / "home")
    assert run(TOY, XDG_CACHE_HOME=home, JAX_COMPILATION_CACHE_DIR=own)[0] == own and files(own)
    assert run(ENABLE, XDG_CACHE_HOME=home, JAX_ENABLE_COMPILATION_CACHE="0") == ["None"]
    assert not Path(home).exists()


def test_a_file_in_its_place_leaves_it_off(tmp_path):
    (tmp_path / "cache").write_text("")
    assert run(TOY, XDG_CACHE_HOME=str(tmp_path / "cache")) == ["None", "(5, 5) 0"]


ASKED = "print(compile_cache.enable())"
WITHOUT_RIGHTS = f"""
os.geteuid() or os.setresuid(54321, 54321, 0)
{ASKED}
os.getresuid()[2] or os.setresuid(0, 0, 0)  # jax still has to be read, and may lie where only its owner reads
"""
NOBODY = "import os\n" + TOY.replace(ASKED, WITHOUT_RIGHTS, 1)


@pytest.mark.parametrize("there", [False, True])
def test_a_directory_without_rights_leaves_it_off_and_silent(there):
    """For any user, and for the superuser as somebody without a name or rights of his own."""
    with tempfile.TemporaryDirectory(prefix="cache-") as home:
        place = Path(home) / "stablelora_jax" / "compiled" / compile_cache._machine()
        if there:
            place.mkdir(parents=True)
        for path in (place, *place.parents[:3]) if there else (Path(home),):
            path.chmod(0o555)
        assert run(NOBODY, XDG_CACHE_HOME=home, PYTHONWARNINGS="error::UserWarning") == ["None", "(5, 5) 0"]
        assert files(home) == []
        for path in (Path(home), *Path(home).rglob("*")):
            path.chmod(0o755)


def test_it_is_never_below_the_working_directory(tmp_path, monkeypatch):
    """A relative XDG_CACHE_HOME counts for nothing, as the specification says; a user may have no home at all."""
    monkeypatch.chdir(tmp_path)
    assert run(ENABLE, XDG_CACHE_HOME="here") == ["None"]
    if os.geteuid() == 0:
        assert run("import os; del os.environ['HOME']\n" + NOBODY, XDG_CACHE_HOME="")[0] == "None"
    assert list(tmp_path.iterdir()) == []


def test_the_directory_is_the_user_s_and_the_machine_s(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    here = compile_cache.default_directory()
    assert here.parts[:4] == ("/", "x", "stablelora_jax", "compiled") and here.name == compile_cache._machine()
    for name in ("", None):  # an empty one counts as none, as the XDG specification says
        monkeypatch.setenv("XDG_CACHE_HOME", name) if name is not None else monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/h")
        assert compile_cache.default_directory() == Path("/h/.cache/stablelora_jax/compiled") / here.name


def test_another_processor_has_another_directory(monkeypatch):
    texts = ["flags : avx2", "flags : avx2 avx512f", "Features : asimd"]
    read = lambda text: lambda self: f"processor : 0\n{text}\nflags : of another\n"
    names = []
    for text in texts:
        monkeypatch.setattr(Path, "read_text", read(text))
        names.append(compile_cache._machine())
    assert len(set(names)) == 3
    monkeypatch.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError()))
    assert compile_cache._machine() not in names
