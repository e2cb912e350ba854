"""Where each leaf of the base lies on a mesh."""

import pytest
from jax.sharding import PartitionSpec as P

from stablelora_jax.parallel.rules import base_spec

SIZES = {"data": 1, "fsdp": 2, "tensor": 4}
ATTENTION = ("model", "layers", "self_attn")


@pytest.mark.parametrize(
    "path,shape,heads,expected",
    [
        ((*ATTENTION, "q_proj", "kernel"), (3, 64, 32), True, P(None, "fsdp", "tensor")),
        ((*ATTENTION, "q_proj", "kernel"), (3, 64, 32), False, P(None, "fsdp", None)),
        ((*ATTENTION, "o_proj", "kernel"), (3, 32, 64), True, P(None, "tensor", "fsdp")),
        ((*ATTENTION, "o_proj", "kernel"), (3, 32, 64), False, P(None, None, "fsdp")),
        ((*ATTENTION, "q_proj", "bias"), (3, 32), True, P()),
        (("model", "layers", "mlp", "up_proj", "kernel"), (3, 64, 48), False, P(None, "fsdp", "tensor")),
        (("model", "layers", "mlp", "down_proj", "kernel"), (3, 48, 64), False, P(None, "tensor", "fsdp")),
        (("model", "layers", "mlp", "down_proj", "kernel"), (3, 46, 63), False, P(None, None, None)),
        (("model", "layers", "input_layernorm", "scale"), (3, 64), True, P()),
        (("model", "embed_tokens", "embedding"), (352, 64), True, P("tensor", "fsdp")),
        (("model", "embed_tokens", "embedding"), (353, 64), True, P(None, "fsdp")),
        (("lm_head", "kernel"), (64, 352), True, P("fsdp", "tensor")),
    ],
)
def test_table(path, shape, heads, expected):
    assert base_spec(path, shape, SIZES, split_heads=heads) == expected
