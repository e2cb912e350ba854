"""An Orbax handler whose reads and writes have all ended when it reports a failure.

Orbax runs each read and each write in an event loop of its own and closes that loop at the first error. TensorStore
continues with the other arrays and calls back into the closed loop; Python then prints ``RuntimeError: Event loop is
closed`` at any later time, also at exit. Here an error is raised only after the other tasks of its loop have ended.

Arrays that are sharded over processes are written by Orbax's own handler of ``jax.Array``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


async def settled(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; where it fails, its error once every other task of the running loop has ended."""
    try:
        return await work
    except Exception:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        raise


def standard_handler() -> Any:
    """An ``ocp.StandardCheckpointHandler``, which reads and writes the same files, around settled reads and writes."""
    import orbax.checkpoint as ocp

    handler = ocp.StandardCheckpointHandler()
    handler._impl = ocp.PyTreeCheckpointHandler(handler_impl=_handlers()())
    return handler


@cache
def _handlers() -> Any:
    """The class of handlers of a tree; made once, after Orbax has been imported."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    class SettledNumpyHandler(ocp.type_handlers.NumpyHandler):
        async def _background_serialize(self, *args: Any, **kwargs: Any) -> None:
            await settled(super()._background_serialize(*args, **kwargs))

    own = (np.ndarray, SettledNumpyHandler()), (jax.Array, ocp.type_handlers.get_type_handler(jax.Array))
    types = ocp.type_handlers.create_type_handler_registry(*own)

    class SettledTreeHandler(ocp.BasePyTreeCheckpointHandler):
        def __init__(self) -> None:
            super().__init__(type_handler_registry=types)

        async def _maybe_deserialize(self, *args: Any, **kwargs: Any) -> Any:
            return await settled(super()._maybe_deserialize(*args, **kwargs))

    return SettledTreeHandler
