"""Ray: connected to, or started on this machine, for as long as it is needed."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stablelora_jax.utils.errors import InputError, brief


def require_ray() -> None:
    """Check that Ray is installed.

    Raises:
      InputError: it is not.
    """
    try:
        from ray import remote  # noqa: F401  # a mere folder called ray can be imported, too
    except ImportError:
        raise InputError('ray: spreading a sweep needs Ray: pip install "stablelora-jax[ray]"') from None


@contextmanager
def cluster(address: str | None, cpus: float, gpus: float, log_fn: Callable[[str], None]) -> Iterator[None]:
    """Be connected to Ray; a connection that is there already is used and left open.

    Args:
      address: as that of ``ray.init``.
      cpus: of a worker.
      gpus: of a worker; a line says so where no machine has as many.
      log_fn: takes lines of text.

    Raises:
      InputError: Ray is not installed, or none answers at the address.
    """
    require_ray()
    import ray

    opened = not ray.is_initialized()
    if opened:
        _connect(address)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(own.get("CPU", 0) >= cpus and own.get("GPU", 0) >= gpus for own in nodes):
            log_fn(f"ray: no machine has {cpus:g} CPUs and {gpus:g} GPUs for a worker; waiting for one that joins")
        yield
    finally:
        if opened:
            ray.shutdown()


def _connect(address: str | None) -> None:
    """``ray.init`` without its reports, its copies of workers' output and its handler of SIGTERM."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before: Any = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        way = "start it with `ray start --head`, or set ray.address to null"
        raise InputError(f"ray.address={address}: no Ray answers there ({brief(error)}): {way}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
