"""Device parallelism. These keys change the result only by rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stablelora_jax.config.engine import Section
from stablelora_jax.config.keys import option


@dataclass(frozen=True)
class PmapConfig(Section):
    """Data parallel over all devices: each holds the base and a part of the rows."""

    name: Literal["pmap"] = option("pmap", "data parallel")


@dataclass(frozen=True)
class MeshConfig(Section):
    """Data, fully sharded and tensor parallel: base and activations split over a mesh of all devices."""

    name: Literal["mesh"] = option("mesh", "data, fully sharded and tensor parallel")
    data: int | None = option(None, "replicas of the base; null: what the other two leave")
    fsdp: int = option(1, "the base is split over so many devices, and gathered layer by layer; rows are split, too")
    tensor: int = option(1, "matrix products and heads are split over so many devices, which see the same rows")


@dataclass(frozen=True)
class DistributedConfig(Section):
    """Several processes as one run, all seeing the same run directory."""

    coordinator: str | None = option(None, "host:port of process 0; null: jax asks Slurm, Kubernetes, the TPU or MPI")
    processes: int | None = option(None, "how many there are")
    process: int | None = option(None, "which of them this one is, from 0")
