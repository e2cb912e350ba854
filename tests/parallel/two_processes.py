"""One of two processes of four fake devices each: ``python -m tests.parallel.two_processes PORT INDEX FOLDER``.

Steps in float64 with dropout; prints one line of JSON for each layout: its losses over all steps, and those of going
on from FOLDER/single, a checkpoint that one process made after half of them. Saves FOLDER/<layout> then, too.
"""

import json
import sys

import jax

jax.config.update("jax_enable_x64", True)
port, index, folder = sys.argv[1:]
from stablelora_jax.parallel import initialize, make_agreement, mesh_layout, pmap_layout, to_host  # noqa: E402
from stablelora_jax.training import checkpoint  # noqa: E402
from stablelora_jax.utils.fingerprint import fingerprint  # noqa: E402

initialize(f"localhost:{port}", 2, int(index))
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from stablelora_jax.training.step import make_train_step  # noqa: E402
from tests.parallel.cases import HALF, HEADS, TX, batches, go, problem  # noqa: E402

model, params, start = problem(jnp.float64, 0.1)
agree = make_agreement()
layouts = {
    "pmap": pmap_layout(),
    "mesh 2 2 2": mesh_layout(2, 2, 2, key_value_heads=HEADS),
    "mesh 1 1 8": mesh_layout(1, 1, 8, key_value_heads=HEADS),
}
for name, layout in layouts.items():

    def place(path, x, layout=layout):
        keys, host = tuple(key.key for key in path), np.asarray(x)
        return jax.make_array_from_callback(
            host.shape, layout.base_sharding(keys, host.shape), lambda index: host[index]
        )

    placed = jax.tree_util.tree_map_with_path(place, params)
    step = make_train_step(model, TX, layout)
    half, losses = go(step, layout, placed, start, batches()[:HALF])
    checkpoint.save(f"{folder}/{name}", HALF, half)
    _, more = go(step, layout, placed, half, batches()[HALF:])
    on = go(step, layout, placed, checkpoint.restore(f"{folder}/single", start), batches()[HALF : HALF + 2])[1]
    pairs = zip(jax.tree.leaves(to_host(placed)), jax.tree.leaves(params), strict=True)
    whole = all(a.tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    answer = agree((int(index), 5 * (1 - int(index))))
    said = {"losses": [*losses, *more], "on": list(on), "base": fingerprint(placed), "whole": whole, "agreed": answer()}
    print(json.dumps({"layout": name, **said}), flush=True)
