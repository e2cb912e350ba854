"""The remat policy by a device's memory. What layers keep is counted in tests/models/test_remat.py."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec, init_adapters
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.models.pretrained.shapes import KNOWN
from stablelora_jax.parallel import mesh_layout
from stablelora_jax.training import remat_policy as memory

NAME = "meta-llama/Llama-3.2-1B"
GIB = 2**30


@pytest.fixture(scope="module")
def case():
    """Llama 3.2 1B in bfloat16 and pairs of rank 16 at all linears: ``(config, params, adapters)``, shapes alone."""
    config = decoder_config(KNOWN[NAME], NAME)
    params = abstract_params(Decoder(config, dtype=jnp.bfloat16))
    init = partial(init_adapters, spec=LoraSpec(target_modules="all-linear", rank=16))
    return config, params, jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), params)


# base 2.30, adapters with gradient and moments 0.17, tiles 0.19, one layer 3.00; kept 12.59, 4.59, 2.09 or 1.00 GiB
@pytest.mark.parametrize(
    "gib,policy",
    [
        (141, "save_dots"),
        (21, "save_dots"),
        (20, "no_mlp"),
        (12, "no_mlp"),
        (11, "attention"),
        (9, "attention"),
        (8, "nothing"),
        (1, "nothing"),
    ],
)
def test_the_policy_is_the_fastest_that_fits(case, gib, policy, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda: gib * GIB)
    assert memory.choose_remat(*case, rows=8, length=2048, dtype=jnp.bfloat16) == policy


def test_fewer_rows_keep_more(case, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda: 8 * GIB)
    chosen = [memory.choose_remat(*case, rows=rows, length=2048, dtype=jnp.bfloat16) for rows in (8, 7, 4, 2)]
    assert chosen == ["nothing", "attention", "no_mlp", "save_dots"]


def test_a_tile_of_logits_is_a_token_of_each_row_at_least(case, monkeypatch):
    """Many short rows: three arrays of 2048 x 128,256 numbers, and not of 64 MiB each."""
    config, how = case[0], {"rows": 2048, "length": 32}
    kept = memory.saved_activation_bytes(config, "save_dots", **how, dtype=jnp.bfloat16, ranks=112, dense=True)
    base, adapters = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in case[1:])
    needed = base + 4 * adapters + kept + memory.working_bytes(config, **how) + 3 * 4 * 2048 * 128_256
    for share, policy in ((1.001, "save_dots"), (0.999, "no_mlp")):
        monkeypatch.setattr(memory, "device_bytes", lambda share=share: share * needed / memory.SHARE)
        assert memory.choose_remat(*case, **how, dtype=jnp.bfloat16) == policy


def test_bytes_by_hand(case):
    """One layer and token of Llama 3.2 1B: the stream, x A, context, lse (float32), q, k, v, the second stream, F."""
    config = case[0]
    how = {"rows": 3, "length": 5, "dtype": jnp.bfloat16, "ranks": 112}
    stream, context, keys = 2048, 32 * 64, 8 * 64
    attention = stream + 112 + context + 2 * 32
    kept = {
        "nothing": stream,
        "attention": attention,
        "no_mlp": attention + context + 2 * keys + stream,
        "save_dots": attention + context + 2 * keys + stream + 2 * 8192,
    }
    for policy, numbers in kept.items():
        assert memory.saved_activation_bytes(config, policy, **how) == 2 * 16 * 15 * numbers
    dense = memory.saved_activation_bytes(config, "save_dots", **how, dense=True)
    assert dense == 2 * 16 * 15 * (kept["save_dots"] + 2 * 32 * (5 - 1)), (
        "probabilities are float32, a row of T a token"
    )


def test_what_is_split_counts_once_a_device():
    x = np.zeros((8, 16), np.float32)
    layout = mesh_layout(2, 2, 2, key_value_heads=2)
    placed = layout.place_base({"model": {"layers": {"mlp": {"up_proj": {"kernel": x}}}}})
    assert memory._bytes(placed) == x.nbytes // 4 and memory._bytes(layout.place_state(x)) == x.nbytes
    assert memory._bytes({"a": x, "b": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}) == x.nbytes + 6


def test_the_memory_of_a_device(monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory.device_bytes() == 7
    device.memory_stats = lambda: None
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}[name])
    assert memory.device_bytes() == 512_000
