"""One product with the parameter ``w``, or one loop of them, in the ways that people write it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tests.lora.foreign.function_models import normal

IN, OUT, MEMBERS = 8, 12, 4
X = normal(1, 8, 5, IN)
IDS = jax.random.randint(jax.random.key(98), (8, 5), 0, MEMBERS)
MATRIX, TRANSPOSED = normal(2, IN, OUT), normal(2, OUT, IN)
STACK, EXPERTS = normal(3, MEMBERS, IN, IN), normal(4, MEMBERS, IN, OUT)


def step(x, w):
    return jnp.tanh(x @ w), None


def nested_scan(w, x):
    """Blocks of two layers."""
    blocks = w.reshape(2, 2, IN, IN)
    return jax.lax.scan(lambda x, block: (jax.lax.scan(step, x, block)[0], None), x, blocks)[0]


def two_scans(w, x):
    return jax.lax.scan(step, jax.lax.scan(step, x, w[:3])[0], w[3:])[0]


def rounded(w, x):
    return x @ w.astype(jnp.bfloat16).astype(jnp.float32)


def sharded(w, x):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None))
    return x @ jax.lax.with_sharding_constraint(w, place)


def attended(w, x):
    """A product and the product with the transpose."""
    return jnp.tanh(x @ w) @ w.T


def in_parts(w, x):
    """Rows of a kernel apart."""
    return jnp.tanh(x[..., :3] @ w[:3]) + x[..., 3:] @ w[3:]


def fused(w, x):
    """Three kernels in one, split before they are used."""
    return sum((i + 1) * jnp.tanh(x @ part) for i, part in enumerate(jnp.split(w, 3, axis=1)))


def mixture(w, x):
    """All experts, weighted by a gate."""
    return jnp.einsum("btef,bte->btf", jnp.einsum("btd,edf->btef", x, w), jax.nn.one_hot(IDS, MEMBERS))


def ragged(w, x):
    return jax.lax.ragged_dot(x.reshape(-1, IN), w, jnp.asarray([10, 5, 20, 5], jnp.int32))


def switch(w, x):
    return jax.lax.switch(1, [lambda x, w, i=i: jnp.tanh(x @ w[i]) for i in range(MEMBERS)], x, w)


def unpacked(w, x):
    for one in w:
        x = jnp.tanh(x @ one)
    return x


def gradient_of_scan(w, x):
    return jax.grad(lambda x: jax.lax.scan(step, x, w)[0].sum())(x)


def hessian(w, x):
    return jax.hessian(lambda v: jnp.tanh(v @ w).sum())(x[0, 0])


def convolution(w, x):
    return jax.lax.conv_general_dilated(x, w[None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


PRODUCTS = {  # name -> ((w, x) -> y, w, the shape of A without the rank, that of B)
    "matmul": (lambda w, x: x @ w, MATRIX, (IN,), (OUT,)),
    "transposed": (lambda w, x: x @ w.T, TRANSPOSED, (IN,), (OUT,)),
    "kernel_first": (lambda w, x: w @ x[0, 0], TRANSPOSED, (IN,), (OUT,)),
    "vmapped": (lambda w, x: jax.vmap(jax.vmap(lambda v: w @ v))(x), TRANSPOSED, (IN,), (OUT,)),
    "reshaped": (lambda w, x: jnp.einsum("btd,dnh->btnh", x, w.reshape(8, 3, 4)), MATRIX, (IN,), (OUT,)),
    "heads": (lambda w, x: jnp.einsum("btd,dnh->bnth", x, w), MATRIX.reshape(IN, 3, 4), (IN,), (OUT,)),
    "rounded": (rounded, MATRIX, (IN,), (OUT,)),
    "jitted": (lambda w, x: jax.jit(jnp.matmul)(x, w), MATRIX, (IN,), (OUT,)),
    "leading_axis": (lambda w, x: jnp.matmul(x, w[None]), MATRIX, (IN,), (OUT,)),
    "scaled": (lambda w, x: x @ (-w / jnp.sqrt(8.0)), MATRIX, (IN,), (OUT,)),
    "sharded": (sharded, MATRIX, (IN,), (OUT,)),
    "attended": (attended, MATRIX, (IN,), (OUT,)),
    "in_parts": (in_parts, MATRIX, (IN,), (OUT,)),
    "every_second": (lambda w, x: x @ w[:, ::2], MATRIX, (IN,), (OUT,)),
    "fused": (fused, MATRIX, (IN,), (OUT,)),
    "bilinear": (lambda w, x: jnp.einsum("btd,dfe,bte->btf", x, w, x), normal(5, 8, 12, 8), (64,), (OUT,)),
    "convolution": (convolution, MATRIX, (IN,), (OUT,)),
    "hessian": (hessian, MATRIX, (IN,), (OUT,)),
    "nested_scan": (nested_scan, STACK, (MEMBERS, IN), (MEMBERS, IN)),
    "two_scans": (two_scans, STACK, (MEMBERS, IN), (MEMBERS, IN)),
    "second_axis": (
        lambda w, x: jax.lax.scan(step, x, jnp.moveaxis(w, 1, 0))[0],
        jnp.moveaxis(STACK, 0, 1),
        (MEMBERS, IN),
        (MEMBERS, IN),
    ),
    "unpacked": (unpacked, STACK, (MEMBERS, IN), (MEMBERS, IN)),
    "mapped": (lambda w, x: jax.lax.map(lambda one: x @ one, w), STACK, (MEMBERS, IN), (MEMBERS, IN)),
    "gradient_of_scan": (gradient_of_scan, STACK, (MEMBERS, IN), (MEMBERS, IN)),
    "switch": (switch, EXPERTS, (MEMBERS, IN), (MEMBERS, OUT)),
    "ragged": (ragged, EXPERTS, (MEMBERS, IN), (MEMBERS, OUT)),
    "mixture": (mixture, EXPERTS, (IN,), (MEMBERS * OUT,)),
    "routed": (
        lambda w, x: jnp.einsum("btd,bte,edf->btf", x, jax.nn.one_hot(IDS, MEMBERS), w),
        EXPERTS,
        (MEMBERS * IN,),
        (OUT,),
    ),
}
