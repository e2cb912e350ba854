"""The provenance of a row: date, GPU, versions, commit."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PACKAGES = ("jax", "jaxlib", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "flax")
PACKAGES += ("optax", "orbax-checkpoint", "numpy", "torch", "transformers", "peft", "google-tunix", "qwix")


def provenance() -> dict[str, Any]:
    """Date, GPU, versions, commit and source hash of a measurement."""
    found = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "card": card(), "versions": versions()}
    return {**found, "commit": commit(), "source": source()}


@cache
def versions() -> dict[str, str]:
    """The versions of Python and of those of :data:`PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def card() -> str:
    """The GPU's name, memory and driver version; without a GPU, the CPU's name."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


@cache
def commit() -> str | None:
    """The git commit, with ``+`` if tracked files are modified; None outside a git repository."""
    try:
        head = _git("rev-parse", "HEAD").strip()
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    run = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=30)
    return run.stdout


@cache
def source() -> str:
    """A hash of all Python files; identifies the source outside a git repository too."""
    found = hashlib.sha256()
    for folder in ("stablelora_jax", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]
