"""What XLA has compiled is kept for the next process, in the user's cache directory.

jax has such a cache and leaves it off. jax's own switches decide first: ``JAX_COMPILATION_CACHE_DIR`` puts it
elsewhere, ``JAX_ENABLE_COMPILATION_CACHE=0`` turns it off. A program for a CPU holds instructions that another CPU may
lack, so kinds of machine that share a home do not share a directory.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax


def enable() -> Path | None:
    """Turn the cache on, before the first compilation; its directory, or None where it is off.

    A directory that cannot be made, or not be written to, leaves it off: a slower start is no reason to stop.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        directory = default_directory()
        if not _writable(directory):
            return None
        jax.config.update("jax_compilation_cache_dir", str(directory))
    return Path(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]


def default_directory() -> Path:
    """``stablelora_jax/compiled/<machine>`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "stablelora_jax" / "compiled" / _machine()


def _writable(directory: Path) -> bool:
    """Whether ``directory`` is there, or could be made, and takes files; never one below the working directory."""
    if not directory.is_absolute():  # a relative XDG_CACHE_HOME, or a user without a home
        return False
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)


def _machine() -> str:
    """The processor's architecture and a digest of its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
