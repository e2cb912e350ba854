"""The compiled step talks between devices as often as theory says, and about nothing that is frozen.

Theory, a layer: fully sharded, one gather of each kernel forwards and one backwards (ZeRO-3); tensor parallel, a sum
after attention and one after the MLP forwards, and backwards one for each product that reads the layer's input (which
XLA joins into one message). The adapters' gradients are summed; no frozen weight has one.
"""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from stablelora_jax.parallel import mesh_layout, pmap_layout
from stablelora_jax.training.cross_entropy import chunk_length
from stablelora_jax.training.step import make_train_step
from tests.parallel.cases import HEADS, SHAPE, TX, batches, problem

D, F, V, L, R = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"], SHAPE["num_hidden_layers"], 2
KERNELS = Counter({(D, D): 4, (D, F): 2, (F, D): 1})  # of a layer
COLLECTIVE = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def compiled(layout, **shape):
    model, params, start = problem(jnp.float32, 0.0, **shape)
    place, batch = layout.abstract, jax.tree.map(jnp.asarray, batches(1)[0])
    step = make_train_step(model, TX, layout)
    return step.lower(place(start, "state"), place(params, "base"), place(batch, "rows")).compile()


def collectives(text):
    """Shapes, sorted, of what each collective gives: {(kind, in a loop): Counter of shapes}."""
    found: dict[tuple[str, bool], Counter] = {}
    messages: Counter = Counter()
    loop = False
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?[\w.-]+ \(.*\{$", line):
            loop = not head.group(1)
        if match := re.search(COLLECTIVE, line):
            key = (match.group(2), loop)
            shapes = [tuple(map(int, s.split(","))) if s else () for s in re.findall(r"\w\[([\d,]*)\]", match.group(1))]
            found.setdefault(key, Counter()).update(shapes)
            messages[key] += 1
    return found, messages


def adapter_shapes(lead=()):
    each = [(D, R)] * 6 + [(F, R)] + [(R, D)] * 5 + [(R, F)] * 2
    return Counter((*lead, *shape) for shape in each)


def turned(shapes):
    """The compiler may form a gradient or its transpose."""
    return Counter(tuple(sorted(shape)) for shape in shapes.elements())


def test_pmap_sums_the_adapters_gradients_and_nothing_else():
    found, _ = collectives(compiled(pmap_layout()).as_text())
    assert set(found) == {("all-reduce", False)}
    large = {shape: n for shape, n in found["all-reduce", False].items() if math.prod(shape) > 1}
    assert turned(Counter(large)) == turned(adapter_shapes((L,)))


@pytest.mark.parametrize("tied", [False, True])
def test_fully_sharded(tied):
    made = compiled(mesh_layout(1, 8, 1, key_value_heads=HEADS), tie_word_embeddings=tied)
    found, messages = collectives(made.as_text())
    assert set(found) == {("all-gather", True), ("all-gather", False), ("all-reduce", True), ("all-reduce", False)}
    assert found["all-gather", True] == KERNELS + KERNELS, "each kernel once forwards and once backwards, a layer"
    outside = Counter([(V, D)] if tied else [(V, D), (D, V)])
    assert found["all-gather", False] == outside, "the embedding and the head, once; never a stack of layers"
    assert turned(found["all-reduce", True]) == turned(adapter_shapes()), (
        "gradients of the adapters of a layer, of nothing frozen"
    )
    assert messages["all-reduce", True] == 1
    assert all(shape == () for shape in found["all-reduce", False]), "the loss and its count"
    base = 4 * (L * (4 * D * D + 3 * D * F) + V * D * (1 if tied else 2))
    state = 4 * 3 * L * sum(map(math.prod, adapter_shapes().elements()))
    assert made.memory_analysis().argument_size_in_bytes < base / 8 + state + 10_000, "an eighth of the base a device"


def test_tensor_parallel():
    found, messages = collectives(compiled(mesh_layout(1, 1, 8, key_value_heads=HEADS)).as_text())
    assert set(found) == {("all-reduce", True), ("all-reduce", False), ("all-gather", False)}
    stream = Counter({shape: n for shape, n in found["all-reduce", True].items() if shape[-1] == D})
    B, T = 16, 32
    chunk = chunk_length(B, T, V)
    layers = "after o and down forwards; into q, k, v, gate and up backwards; into the head, tile by tile"
    assert stream == {(B, T, D): 2 + 5, (B, chunk, D): 1}, layers
    assert messages["all-reduce", True] == 4 + 3, "of a layer; of a tile its maximum, its sums and its gradient"
    assert set(found["all-reduce", True]) == {(B, T, D), (B, T, R), (B, chunk, D), (B, chunk, 1), (B, chunk)}
    gathered = Counter([(L, R, D)] * 3 + [(L, R, F)] * 2 + [(L, D, R), (L, F, R)])
    assert turned(found["all-gather", False]) == turned(gathered), (
        "gradients of the factors that lie on a split side, once a step"
    )


def test_all_three():
    found, _ = collectives(compiled(mesh_layout(2, 2, 2, key_value_heads=HEADS)).as_text())
    assert found["all-gather", True] == {(D, D // 2): 6, (D // 2, D): 2, (D, F // 2): 4, (F // 2, D): 2}
    frozen = {(D, D), (D, F), (F, D), (V, D), (D, V), (D, D // 2), (D // 2, D), (D, F // 2), (F // 2, D)}
    summed = found["all-reduce", True] + found["all-reduce", False]
    assert not frozen & set(summed) and not any(kind in ("all-to-all", "collective-permute") for kind, _ in found)
