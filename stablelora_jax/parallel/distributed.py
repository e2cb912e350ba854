"""Several processes as one run: ``jax.distributed``, and who writes.

On Slurm, on TPU pods, on Kubernetes and under Open MPI jax finds the other processes by itself; elsewhere a coordinator
is given. Every process must see the same run directory.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablelora_jax.utils.errors import InputError, brief


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes; once, before anything is computed.

    Args:
      coordinator: ``host:port`` of process 0; None: jax asks the cluster.
      processes: how many there are in all.
      process: which of them this one is, from 0.

    Raises:
      InputError: the arguments do not fit each other, no such host is known, or there is no cluster to ask.
    """
    given = (coordinator, processes, process)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise InputError("distributed needs all of coordinator, processes and process, or none of them")
    if process is not None and processes is not None and not 0 <= process < processes:
        raise InputError(f"distributed.process must be in [0, {processes - 1}], not {process}")
    if coordinator is not None:
        _require_host(coordinator)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the processes of this run did not find each other: {brief(error)}") from None


PATIENCE = 5.0  # seconds in which a host may come to be known, as where a cluster starts all at once


def _require_host(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isdecimal() and port.isascii() and len(port) <= 5 and 0 < int(port) < 2**16):
        raise InputError(f"distributed.coordinator must be host:port, not {coordinator:.80}")
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or brief(error)
            known = isinstance(error, OSError)
        if not known or time.monotonic() > end:
            raise InputError(f"distributed.coordinator: the host of {coordinator!r:.80} is not found: {reason}")
        time.sleep(0.5)


def require_devices() -> None:
    """Start jax's backend.

    Raises:
      InputError: there is none of the kind that is asked for, or nothing is to be compiled.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise InputError("JAX_DISABLE_JIT is on, and what runs here is compiled: unset it")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second where jax is built without that kind
        wanted = os.environ.get("JAX_PLATFORMS") or "any kind"
        raise InputError(
            f"jax finds no device of {wanted}: {brief(error) or 'it is built without'}; see JAX_PLATFORMS"
        ) from None


def is_primary() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


def make_agreement() -> Callable[[Sequence[int]], Callable[[], tuple[int, ...]]]:
    """``numbers -> (() -> the greatest of every process's numbers)``, so that all processes do the same.

    The first call begins, the second waits for the answer: between them a step of training may run. One process agrees
    with itself at once.
    """
    if jax.process_count() == 1:
        return lambda numbers: lambda: tuple(numbers)
    mesh = Mesh(np.array(jax.devices()), ("all",))
    split, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    greatest = jax.jit(lambda x: x.max(axis=0), out_shardings=whole)

    def begin(numbers: Sequence[int]) -> Callable[[], tuple[int, ...]]:
        row = np.asarray(numbers, np.int32)[None]
        shape = (jax.device_count(), len(numbers))
        found = greatest(jax.make_array_from_callback(shape, split, lambda index: row))
        return lambda: tuple(int(x) for x in np.asarray(found.addressable_shards[0].data))

    return begin
