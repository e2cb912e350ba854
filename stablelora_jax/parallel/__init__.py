"""Where a run's arrays lie, on any number of devices and processes: ``pmap_layout`` or ``mesh_layout``.

A step, an evaluation and a measurement are written once, as pure functions. A :class:`Layout` places what they take
(the base, the state, the rows of a batch), compiles them, and fetches what they give.

Imports: utils.
"""

from stablelora_jax.parallel.distributed import barrier, initialize, is_primary, make_agreement, require_devices
from stablelora_jax.parallel.layout import Layout, Takes, gather, rows_here, to_host
from stablelora_jax.parallel.mesh import mesh_layout
from stablelora_jax.parallel.pmap import pmap_layout

__all__ = [
    "Layout",
    "Takes",
    "barrier",
    "gather",
    "initialize",
    "is_primary",
    "make_agreement",
    "mesh_layout",
    "pmap_layout",
    "require_devices",
    "rows_here",
    "to_host",
]
