"""Models that are plain functions ``fn(params, *args)``: nested dicts, pytrees of Equinox, every form of a loop.

Each builder returns ``(fn, params, args)``. They are written in the style of hand-written JAX and of Haiku's, not taken
from a library.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

WIDTH, HIDDEN, LAYERS, VOCAB = 8, 12, 3, 11


def normal(number, *shape, size=0.4):
    """Random numbers of one of many fixed keys."""
    return size * jax.random.normal(jax.random.key(number), shape)


def haiku_like():
    """Haiku's layout: module names with slashes and a tilde, leaves ``w``, ``b`` and ``embeddings``."""
    params = {
        "net/~/embed": {"embeddings": normal(0, VOCAB, WIDTH)},
        "net/~/mlp/~/linear_0": {"w": normal(1, WIDTH, HIDDEN), "b": normal(2, HIDDEN)},
        "net/~/mlp/~/linear_1": {"w": normal(3, HIDDEN, WIDTH), "b": normal(4, WIDTH)},
        "net/~/layer_norm": {"scale": 1 + normal(5, WIDTH), "offset": normal(6, WIDTH)},
    }

    def linear(module, x):
        return jnp.dot(x, module["w"]) + jnp.expand_dims(module["b"], range(x.ndim - 1))

    def fn(params, tokens):
        x = params["net/~/embed"]["embeddings"][tokens]
        y = jax.nn.relu(linear(params["net/~/mlp/~/linear_0"], x))
        norm = params["net/~/layer_norm"]
        y = jax.nn.standardize(x + linear(params["net/~/mlp/~/linear_1"], y), axis=-1)
        return y * norm["scale"][None, None] + norm["offset"][None, None]

    return fn, params, (token_ids(),)


def token_ids():
    return jax.random.randint(jax.random.key(99), (8, 5), 0, VOCAB)


def layer(weights, x):
    """One pre-norm layer: fused ``qkv`` (3, D, D), ``out`` (D, D), ``up`` (D, F), ``down`` (F, D)."""
    y = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * weights["norm"][None, None]
    q, k, v = jnp.einsum("btd,cdh->cbth", y, weights["qkv"])
    logits = jnp.einsum("bth,bsh->bts", q, k)
    logits = jnp.where(jnp.tril(jnp.ones(logits.shape[1:], bool))[None], logits, -1e30)
    x = x + jnp.einsum("bts,bsh,hd->btd", jax.nn.softmax(logits), v, weights["out"])
    return x + jax.nn.gelu(x @ weights["up"]) @ weights["down"]


def transformer_params(number):
    """Every layer's parameters stacked in front, as JAX's tutorials have them."""
    shapes = {
        "norm": (WIDTH,),
        "qkv": (3, WIDTH, WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    layers = {name: normal(i, number, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return {"embed": normal(20, VOCAB, WIDTH), "layers": layers, "unembed": normal(21, WIDTH, VOCAB)}


def transformer(loop, number=LAYERS):
    """A decoder over a plain dict; ``loop`` (layers, x) -> x runs its stacked layers."""

    def fn(params, tokens):
        return loop(params["layers"], params["embed"][tokens]) @ params["unembed"]

    return fn, transformer_params(number), (token_ids(),)


def depth(layers):
    return len(layers["norm"])


def by_scan(layers, x):
    return jax.lax.scan(lambda x, weights: (layer(weights, x), None), x, layers)[0]


def by_scan_of_remat(layers, x):
    return jax.lax.scan(lambda x, weights: (jax.checkpoint(layer)(weights, x), None), x, layers)[0]


def by_scan_reversed(layers, x):
    return jax.lax.scan(lambda x, weights: (layer(weights, x), None), x, layers, reverse=True)[0]


def by_python_loop(layers, x):
    for i in range(depth(layers)):
        x = layer(jax.tree.map(lambda leaf, i=i: leaf[i], layers), x)
    return x


def by_fori_loop(layers, x):
    """``W[i]`` with an index that is traced."""
    return jax.lax.fori_loop(0, depth(layers), lambda i, x: layer(jax.tree.map(lambda leaf: leaf[i], layers), x), x)


def by_scan_over_numbers(layers, x):
    """The stack is a constant of the scan, and the number of the layer is scanned."""

    def step(x, i):
        at = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
        return layer(jax.tree.map(at, layers), x), None

    return jax.lax.scan(step, x, jnp.arange(depth(layers)))[0]


LOOPS = {f.__name__: f for f in (by_scan, by_scan_of_remat, by_python_loop, by_fori_loop, by_scan_over_numbers)}


def by_while_loop(layers, x):
    """A loop whose length is not known: no reverse mode, in the base either."""
    body = lambda state: (state[0] + 1, layer(jax.tree.map(lambda leaf: leaf[state[0]], layers), state[1]))
    return jax.lax.while_loop(lambda state: state[0] < depth(layers), body, (0, x))[1]


def conditional():
    """``cond`` with a weight of its own in each branch, and one that both read."""
    params = {name: {"kernel": normal(i, WIDTH, WIDTH)} for i, name in enumerate(("shared", "yes", "no"))}

    def fn(params, x, flag):
        branch = lambda name: lambda x: jnp.tanh(x @ params[name]["kernel"]) @ params["shared"]["kernel"]
        return jax.lax.cond(flag, branch("yes"), branch("no"), x)

    return fn, params, (normal(5, 8, 5, WIDTH), jnp.asarray(True))


def force():
    """A gradient inside the model: an energy by two products, and the force, which reads both kernels twice."""
    params = {"a": {"kernel": normal(1, WIDTH, HIDDEN)}, "b": {"kernel": normal(2, HIDDEN, 1)}}

    def fn(params, x):
        energy = lambda x: jnp.sum(jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"])
        return jax.grad(energy)(x)

    return fn, params, (normal(3, 8, WIDTH),)


def several_outputs():
    """A dict, a tuple, an output that no adapter changes and one that is None."""
    params = {"a": {"kernel": normal(1, WIDTH, HIDDEN)}, "b": {"kernel": normal(2, HIDDEN, 4)}}

    def fn(params, x, *, scale):
        h = jnp.tanh(x @ params["a"]["kernel"])
        return {"h": h, "pair": (scale * (h @ params["b"]["kernel"]), x.sum()), "none": None}

    return fn, params, (normal(3, 8, WIDTH),)


def tied():
    """One table as look-up and as head."""
    params = {"table": {"embedding": normal(1, VOCAB, WIDTH)}, "fc": {"kernel": normal(2, WIDTH, WIDTH)}}

    def fn(params, tokens):
        table = params["table"]["embedding"]
        return jnp.tanh(table[tokens] @ params["fc"]["kernel"]) @ table.T

    return fn, params, (token_ids(),)


@jax.custom_jvp
def ternary(w):
    """Weights rounded to -1, 0, 1, with the gradient passed straight through."""
    return jnp.round(jnp.clip(w, -1, 1))


ternary.defjvp(lambda primals, tangents: (ternary(*primals), tangents[0]))


@jax.custom_vjp
def own_matmul(x, w):
    """A product with a hand-written gradient."""
    return x @ w


own_matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def refused():
    """A second weight that reaches something else than a product: name -> (fn, params, args)."""
    params = {"a": {"kernel": normal(1, WIDTH, HIDDEN)}, "b": {"kernel": normal(2, HIDDEN, HIDDEN)}}
    x = normal(3, 8, WIDTH)
    first = lambda p, x: jnp.tanh(x @ p["a"]["kernel"])
    fns = {
        "custom_jvp": lambda p, x: first(p, x) @ ternary(p["b"]["kernel"]),
        "squared": lambda p, x: first(p, x) @ p["b"]["kernel"] ** 2,
        "normalised": lambda p, x: first(p, x) @ (p["b"]["kernel"] / jnp.linalg.norm(p["b"]["kernel"])),
        "added": lambda p, x: first(p, x) + p["b"]["kernel"][:8],
        "joined": lambda p, x: first(p, x) @ jnp.concatenate([p["b"]["kernel"], p["b"]["kernel"]], axis=1),
        "returned": lambda p, x: (first(p, x), p["b"]["kernel"]),
        "never_read": first,
        "product_of_two": lambda p, x: x @ (p["a"]["kernel"] @ p["b"]["kernel"]),
    }
    return {name: (fn, params, (x,)) for name, fn in fns.items()}
