"""What a row says of where it was measured: versions, card, commit."""

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


def place() -> dict[str, Any]:
    """What every row says of where and when it was measured."""
    found = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "card": card(), "versions": versions()}
    return {**found, "commit": commit(), "source": source()}


@cache
def versions() -> dict[str, str]:
    """Of Python and of what is installed among the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def card() -> str:
    """The GPU's name, memory and driver, or the processor's name."""
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
    """The commit, with ``+`` where files differ from it; None where the tree has travelled without its history."""
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
    """A hash of all Python files, the same for the same tree with and without its history."""
    found = hashlib.sha256()
    for folder in ("stablelora_jax", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]
