"""One table over all ways of attention: values and gradients, segments, windows, memory, names, and what picks one."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from stablelora_jax.models.attention import KINDS, SEGMENTS, attend, best_attention, best_here, self_attention
from stablelora_jax.models.attention_kernels import cudnn as attention_cudnn
from stablelora_jax.models.attention_kernels import cudnn_packed
from stablelora_jax.models.attention_kernels.cudnn_packed import segments_of
from stablelora_jax.models.attention_kernels.splash import splash
from stablelora_jax.models.attention_kernels.tiles import pairs, tile_size, tiled_ids
from stablelora_jax.models.remat import saveable
from stablelora_jax.training.flops import dots
from stablelora_jax.utils.errors import InputError
from tests.helpers import jit, largest_difference, tiny_decoder

T = 131  # a prime, so no tile divides it
PACKED = [[1] * 40 + [2] * 61 + [3] * 22 + [0] * 8, [1] * 3 + [2] * 120 + [3] * 8]


def inputs(length=T, heads=4, groups=2, width=16, dtype=jnp.float32, seed=0):
    rng, K = np.random.default_rng(seed), heads // groups
    return [jnp.asarray(rng.normal(size=(2, length, n, width)), dtype) for n in (heads, K, K)]


def reference(q, k, v, segment_ids=None, window=None):
    """Transcription: every key head repeated, what is not seen has a score of minus infinity."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    i, j = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])[None, :]
    sees = (j <= i) & (i - j < (window or np.inf)) & np.ones((len(q), 1, 1), bool)
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        sees = sees & (ids[:, :, None] == ids[:, None, :])
    scores = jnp.where(sees[:, None], jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    probs = jnp.exp(scores) / jnp.exp(scores).sum(-1, keepdims=True)
    return jnp.einsum("bhij,bjhd->bihd", probs, v)


def way(kind):
    """A kind as it can run on this machine."""
    return partial(splash, interpret=True) if kind == "splash" else partial(self_attention, kind=kind)


def with_gradients(attention, q, k, v, *args, use=jit):
    """The output and the gradients of a cost that is not linear in it."""
    weight = jnp.cos(q)

    def cost(q, k, v, *args):
        out = attention(q, k, v, *args)
        return (jnp.sin(out) * weight).sum(), out

    (_, out), grads = use(jax.value_and_grad(cost, (0, 1, 2), has_aux=True))(q, k, v, *args)
    return out, *grads


CASES = {
    "whole rows": dict(),
    "packed": dict(segments=PACKED),
    "window": dict(window=50),
    "window of one": dict(window=1),
    "packed window": dict(segments=PACKED, window=7),
    "one key head": dict(groups=4, segments=PACKED),
    "own key heads": dict(groups=1, segments=PACKED),
    "one token": dict(length=1),
    "few tiles, window": dict(length=16, window=9),
}


@pytest.mark.parametrize("kind", ["xla", "blockwise"])
@pytest.mark.parametrize(
    "case, traced", [(case, traced) for case in CASES for traced in (False, True) if not traced or "window" in case]
)
def test_float64_equals_a_transcription(kind, case, traced, x64):
    case = dict(CASES[case])
    segments, window = case.pop("segments", None), case.pop("window", None)
    x = inputs(**case, dtype=jnp.float64)
    ids = None if segments is None else jnp.array(segments, jnp.int32)
    expected = with_gradients(lambda *x: reference(*x, segments, window), *x)
    if traced:
        found = with_gradients(way(kind), *x, ids, jnp.int32(window))
    else:
        found = with_gradients(lambda q, k, v, ids: way(kind)(q, k, v, ids, window), *x, ids)
    assert [y.dtype for y in found] == [jnp.float64] * 4
    assert largest_difference(found, expected) < 1e-9


@pytest.mark.parametrize(
    "kind, case", [("splash", "packed"), ("splash", "window"), ("xla", "packed"), ("blockwise", "packed")]
)
def test_float32_and_bfloat16_equal_a_transcription(kind, case):
    segments, window = CASES[case].get("segments"), CASES[case].get("window")
    x = inputs(width=64)
    ids = None if segments is None else jnp.array(segments, jnp.int32)
    run = jit(lambda q, k, v: with_gradients(lambda *x: way(kind)(*x, ids, window), q, k, v, use=lambda f: f))
    expected = with_gradients(lambda *x: reference(*x, segments, window), *x)
    assert largest_difference(run(*x), expected) < 1e-5 * max(1, *(float(jnp.abs(y).max()) for y in expected))
    if kind == "splash":  # which is slow here
        return
    half = [y.astype(jnp.bfloat16) for y in x]
    found = run(*half)
    assert {y.dtype for y in found} == {jnp.dtype(jnp.bfloat16)}
    accum_dtype = with_gradients(lambda *x: reference(*x, segments, window), *[y.astype(jnp.float32) for y in half])
    assert largest_difference([y.astype(jnp.float32) for y in found], accum_dtype) < 0.1


def test_dense_equals_attention_by_a_mask():
    q, k, v = inputs()
    ids = jnp.array(PACKED, jnp.int32)
    mask = np.tri(T, dtype=bool)[None] & (ids[:, :, None] == ids[:, None, :])
    assert largest_difference(self_attention(q, k, v, ids), attend(q, k, v, mask)) < 1e-6


DOCUMENTS = [(0, 40), (40, 101), (101, 131)]


def pack(x, order):
    return [jnp.concatenate([y[:, slice(*DOCUMENTS[i])] for i in order], axis=1) for y in x]


@pytest.mark.parametrize("kind", ["xla", "blockwise", "splash"])
def test_documents_in_a_row_know_nothing_of_each_other(kind):
    """Packed equals separate; in another order, the same; another first document leaves each bit of the others."""
    x, sizes = inputs(width=64), [b - a for a, b in DOCUMENTS]

    def packed(x, order):
        ids = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 3]), jnp.array([sizes[i] for i in order])), (2, T))
        ends = np.cumsum([sizes[i] for i in order])
        parts = zip(
            *(jnp.split(y, ends[:-1], axis=1) for y in run(*pack(x, order), ids.astype(jnp.int32))), strict=True
        )
        return dict(zip(order, parts, strict=True))

    run = jit(lambda q, k, v, ids: with_gradients(way(kind), q, k, v, ids, None, use=lambda f: f))
    first, turned = packed(x, (0, 1, 2)), packed(x, (2, 0, 1))
    alone = with_gradients(way(kind), *(y[:, slice(*DOCUMENTS[1])] for y in x), None, None)
    assert largest_difference(first[1], alone) < 1e-5
    assert largest_difference(first, turned) < 1e-5
    other = packed([jnp.concatenate([3 * y[:, :40] + 1, y[:, 40:]], axis=1) for y in x], (0, 1, 2))
    assert largest_difference(first[0], other[0]) > 0.1
    assert all(np.array_equal(a, b) for i in (1, 2) for a, b in zip(first[i], other[i], strict=True))


@pytest.mark.parametrize("kind", ["xla", "blockwise"])
def test_ids_in_any_order_hide_what_they_should(kind):
    """Tiles are skipped by the ranges of their ids: also right where these do not grow."""
    ids = np.random.default_rng(3).integers(0, 4, (2, T)).astype(np.int32)
    x = inputs()
    assert largest_difference(jit(way(kind))(*x, ids), reference(*x, ids)) < 1e-5


def test_tiles_of_other_documents_and_before_the_window_are_skipped():
    """Rows of four tiles of 8: two documents and pads, one document; then a traced window of 9."""
    ids = jnp.array([[1] * 8 + [2] * 15 + [0] * 9, [1] * 8 + [2] * 8 + [3] * 16], jnp.int32)
    needed = lambda *args: {(int(i), int(j)) for i, j, n in zip(*pairs(4, 8, *args), strict=True) if n}
    assert needed(tiled_ids(ids, 32), None, None) == {(2, 1), (3, 2)}
    assert needed(None, jnp.int32(9), None) == {(1, 0), (2, 1), (3, 2)}
    assert needed(None, jnp.int32(10), None) == needed(None, jnp.int32(9), None) | {(2, 0), (3, 1)}
    assert len(pairs(4, 8, None, None, 9)[0]) == 3 and len(pairs(4, 8, None, None, 10)[0]) == 5
    assert len(pairs(4, 8, None, None, 1)[0]) == 0


def sizes(text):
    """The shapes of all buffers of a compiled program."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", text)}


def test_tiles_never_hold_two_axes_of_tokens():
    """In forward and backward, packed and windowed; the dense way does, so the test can see it."""
    x, ids = inputs(heads=2, groups=1, width=8), jnp.array(PACKED, jnp.int32)

    def large(kind):
        run = jax.jit(lambda q, k, v, w: with_gradients(way(kind), q, k, v, ids, w, use=lambda f: f))
        text = run.lower(*x, jnp.int32(70)).compile().as_text()
        return [shape for shape in sizes(text) if sum(n >= T // 2 for n in shape) > 1]

    assert large("xla") and not large("blockwise")


def test_tiles_do_not_lengthen_the_program():
    run = jax.jit(jax.grad(lambda q, k, v: self_attention(q, k, v, kind="blockwise").sum(), (0, 1, 2)))
    lines = [len(run.lower(*inputs(length=length, heads=1, groups=1)).as_text().splitlines()) for length in (512, 8192)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_tiles_multiply_half_of_all_pairs_and_little_more(length):
    """Two products forwards and five backwards, each of T (T + t / 2) / 2 pairs of tokens; ``do * out`` is one of T."""
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length=length, groups=1))
    run = jax.value_and_grad(lambda q, k, v: jnp.sin(self_attention(q, k, v, kind="blockwise")).sum(), (0, 1, 2))
    visited = length * (length + tile_size(length) / 2) / 2
    assert dots(jax.make_jaxpr(run)(q, k, v)) == (7 * visited + length) * 2 * math.prod([2, 4, 16])


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.fixture
def binding():
    """jax's private lowering, if this jax has it where we know it: only tests look there."""
    return pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")


@pytest.fixture
def fake_cudnn(monkeypatch, binding):
    """Answers of a Hopper to jax's questions, and to ours."""
    monkeypatch.setattr(binding, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(binding, "check_compute_capability", lambda least: True)
    monkeypatch.setattr(binding, "is_cuda_compute_capability_equal", lambda other: False)
    monkeypatch.setattr(attention_cudnn, "compute_capability", lambda: 9.0)


def count_primitives(run, x, word):
    program = jax.make_jaxpr(jax.value_and_grad(run, (0, 1, 2)))(*x).jaxpr
    program, _ = dce_jaxpr(program, [True] * len(program.outvars))
    return sum(word in f"{eqn.primitive} {eqn.params.get('target_name')}" for eqn in equations(program))


@pytest.mark.parametrize(
    "kind, heavy, once",
    [("xla", "exp", 1), ("blockwise", "scan", 2), ("cudnn", "fmha", 2), ("splash", "pallas_call", 3)],
)
def test_what_is_named_is_not_computed_twice(kind, heavy, once, fake_cudnn):
    """Under a policy that saves the names, the backward finds all it needs; without them, the forward runs again."""
    x, ids = inputs(width=64, dtype=jnp.bfloat16), jnp.array(PACKED, jnp.int32)

    def heavies(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        run = jax.checkpoint(lambda *x: jnp.sin(self_attention(*x, ids, kind=kind)).sum(), policy=policy)
        return count_primitives(run, x, heavy)

    assert heavies("context", "lse", "attention_probs") == once < heavies("nothing")


@pytest.mark.parametrize("length", [T, T + 1])
@pytest.mark.parametrize("policy, calls", [("save_dots", 2), ("attention", 2), ("nothing", 3)])
def test_whole_rows_by_cudnn_are_not_computed_twice(length, policy, calls, fake_cudnn):
    """jax names nothing there: the policies know the primitive. One copy of the output is saved."""
    x = inputs(length=length, width=64, dtype=jnp.bfloat16)
    run = jax.checkpoint(lambda *x: jnp.sin(self_attention(*x, kind="cudnn")).sum(), policy=saveable(policy))
    assert count_primitives(run, x, "dot_product_attention") == calls


def run_starts(ids):
    """Oracle of segments_of: for each row, ``[(start, length), ...]``."""
    rows = []
    for row in np.asarray(ids):
        bounds = [0, *(np.flatnonzero(row[1:] != row[:-1]) + 1), len(row)]
        rows.append([(a, b - a) for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_segments_are_found(seed):
    """Counted over the batch, in order; a row of too many is flagged and changes no other row."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 9, 40) for _ in range(4)]
    ids = np.stack([np.repeat(np.arange(1, 41), n)[:37] for n in lengths]).astype(np.int32)
    ids[:, 33:] = 0
    expected = run_starts(ids)
    most = max(map(len, expected))
    for cap in (most, most + 3, most - 1):
        starts, counts, fits = jit(partial(segments_of, most=cap))(ids)
        assert starts.shape == (4, cap + 1) and counts.shape == (4, cap) and starts.dtype == counts.dtype == jnp.int32
        assert fits.tolist() == [len(row) <= cap for row in expected]
        found = [(a, n) for a, n in zip(starts.ravel().tolist(), counts.ravel().tolist(), strict=False) if n]
        for number, (row, fit) in enumerate(zip(expected, fits.tolist(), strict=True)):
            own = [(a - 37 * number, n) for a, n in found if a // 37 == number]
            assert own == row if fit else own[:-1] == row[: cap - 1] and sum(own[-1]) == 37
        rest = len(found)
        assert (starts.ravel()[rest:] == ids.size).all() and not counts.ravel()[rest:].any()


def test_cudnn_is_handed_each_segment_of_each_row(monkeypatch):
    """Offsets count elements from the first row's start, each by its own heads."""
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(groups=2))
    ids, seen = jnp.array(PACKED, jnp.int32), []

    def call(*_, **__):
        return lambda *operands: seen.append(operands) or [operands[0].transpose(0, 2, 1, 3), None]

    monkeypatch.setattr(jax.ffi, "ffi_call", call)
    cudnn_packed.packed_attention(q, k, v, ids, 6)
    [(*_, lengths, lengths_kv, at, at_kv)] = seen
    expected = [(row * T + a, n) for row, runs in enumerate(run_starts(ids)) for a, n in runs]
    assert lengths.ravel()[:7].tolist() == [n for _, n in expected] and not lengths.ravel()[7:].any()
    assert lengths_kv is lengths
    for x, offsets in ((q, at), (k, at_kv)):
        stride = x.shape[2] * x.shape[3]
        assert offsets.ravel()[:8].tolist() == [a * stride for a, _ in expected] + [x.size]


def custom_calls(run, x):
    """cuDNN's calls in a program for a GPU, without the names of operands: ``[(call, configuration), ...]``."""
    text, found = jax.jit(run).trace(*x).lower(lowering_platforms=("cuda",)).as_text(), []
    for line in text.splitlines():
        if "custom_call @__cudnn" in line:
            quoted = re.search(r'backend_config = "((?:[^"\\]|\\.)*)"', line).group(1)
            config = json.loads(quoted.replace("\\22", '"').replace('\\"', '"'))
            found.append((re.sub(r"%[\w:#]+", "%", line.replace(quoted, "")).strip(), config))
    return found


def without_defaults(config):
    """jax writes out empty fields of the scores' shape."""
    drop = lambda tree: {
        name: drop(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if value not in ([], "0", "PRIMITIVE_TYPE_INVALID")
    }
    own = config["cudnn_fmha_backend_config"]
    shape = drop(own["intermediate_tensor_shape"])
    return {**config, "cudnn_fmha_backend_config": {**own, "intermediate_tensor_shape": shape}}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_calls_are_those_of_jax_s_own_lowering(dtype, groups, fake_cudnn, binding):
    q, k, v = inputs(length=132, groups=groups, width=64, dtype=dtype)
    starts, lengths, _ = segments_of(jnp.ones((2, 132), jnp.int32), 9)

    def theirs(q, k, v):
        where = dict(q_offsets=starts, kv_offsets=starts, q_seqlen=lengths, kv_seqlen=lengths)
        mask = binding.MaskType.PADDING_CAUSAL
        return binding.dot_product_attention(q, k, v, **where, scale=q.shape[-1] ** -0.5, mask_type=mask)

    ours = lambda q, k, v: cudnn_packed._fused(q, k, v, starts, lengths)
    for use in (lambda f: f, lambda f: jax.grad(lambda *x: f(*x).sum(), (0, 1, 2))):
        expected = [(call, without_defaults(config)) for call, config in custom_calls(use(theirs), (q, k, v))]
        assert expected and custom_calls(use(ours), (q, k, v)) == expected


def by_cudnn(q, k, v, lengths, at, at_kv):
    """What cuDNN does with the offsets and lengths that it is given; what no segment covers is garbage."""
    label = np.zeros(q.shape[0] * q.shape[1], np.int32)
    for number, (a, b, n) in enumerate(zip(at.ravel()[:-1], at_kv.ravel()[:-1], lengths.ravel(), strict=False), 1):
        start = int(a) // (q.shape[2] * q.shape[3])
        assert start * k.shape[2] * k.shape[3] == b
        label[start : start + int(n)] = number
    label = label.reshape(q.shape[:2])
    return jnp.where(label[:, :, None, None] > 0, reference(q, k, v, label), jnp.nan)


@pytest.fixture
def emulated_cudnn(monkeypatch):
    """jax's two public functions, with the arguments that they are given."""

    def whole_rows(q, k, v, *, is_causal, local_window_size, implementation):
        assert is_causal and implementation == "cudnn" and q.shape[1] % 2 == 0
        before, after = local_window_size or (None, 0)
        assert after == 0
        return reference(q, k, v, None, None if before is None else before + 1)

    def ffi_call(target, results, *, output_layouts, legacy_backend_config, custom_call_api_version, vmap_method):
        config = json.loads(legacy_backend_config)["cudnn_fmha_backend_config"]
        assert custom_call_api_version == 2 and config["mask_type"] == "PADDING_CAUSAL"

        def call(q, k, v, *more):
            *more, lengths, lengths_kv, at, at_kv = more
            assert lengths_kv is lengths and config["fmha_scale"] == q.shape[-1] ** -0.5
            assert config["max_seg_per_batch"] == lengths.shape[1] == at.shape[1] - 1
            run = lambda *x: by_cudnn(*x, lengths, at, at_kv)
            if target == "__cudnn$fmhaSoftmax":
                out = [run(q, k, v)] + [jnp.full(x.shape, 7.0, x.dtype) for x in results[1:-1]]
            else:
                lse, given, out = more
                expected, back = jax.vjp(run, q, k, v)
                assert (lse == 7).all() and np.array_equal(out, expected)
                out = list(back(given))
            swapped = [x.transpose(0, 2, 1, 3) if x.ndim == 4 else x for x in out]
            assert [x.shape for x in swapped] == [x.shape for x in results[:-1]]
            return [*swapped, jnp.zeros(0, jnp.uint8)]

        return call

    monkeypatch.setattr(attention_cudnn, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax.nn, "dot_product_attention", whole_rows)
    monkeypatch.setattr(jax.ffi, "ffi_call", ffi_call)


@pytest.mark.parametrize("case", ["whole rows", "window", "packed"])
def test_cudnn_s_way_is_the_others(case, emulated_cudnn):
    segments, window = CASES[case].get("segments"), CASES[case].get("window")
    ids = None if segments is None else jnp.array(segments, jnp.int32)
    x = inputs(dtype=jnp.float16)
    found = with_gradients(lambda *x: self_attention(*x, ids, window, kind="cudnn"), *x, use=lambda f: f)
    expected = with_gradients(lambda *x: reference(*x, segments, window), *[y.astype(jnp.float32) for y in x])
    assert largest_difference([y.astype(jnp.float32) for y in found], expected) < 0.02


@pytest.fixture
def idle_cudnn(monkeypatch):
    """A GPU that gives back the queries."""
    monkeypatch.setattr(attention_cudnn, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **__: q)
    monkeypatch.setattr(cudnn_packed, "_fused", lambda q, *_: q)


def test_a_row_of_too_many_segments_is_nan(idle_cudnn):
    """Never mixed, never dropped: the loss is not finite, and the loop reports it. Other rows are whole."""
    ids = jnp.array([[1, 2, 3, 0], [1, 1, 2, 2]], jnp.int32)
    q, k, v = inputs(length=4, dtype=jnp.bfloat16)
    bad = jnp.isnan(self_attention(q, k, v, ids, kind="cudnn", segments=3))
    assert bad[0].all() and not bad[1].any()
    assert not jnp.isnan(self_attention(q, k, v, ids, kind="cudnn", segments=4)).any()


@pytest.mark.parametrize("case", ["whole rows", "window", "packed"])
def test_cudnn_lowers_for_a_gpu(case, fake_cudnn):
    segments, window = CASES[case].get("segments"), CASES[case].get("window")
    ids = None if segments is None else jnp.array(segments, jnp.int32)
    run = jax.jit(jax.grad(lambda *x: self_attention(*x, ids, window, kind="cudnn", segments=9).sum(), (0, 1, 2)))
    traced = run.trace(*inputs(width=64, dtype=jnp.bfloat16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", "'")
    calls = re.findall(r"@(__cudnn\$\w+)\(([^)]*)\)", text)
    assert [name for name, _ in calls] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert [len(operands.split(",")) for _, operands in calls] == ([7, 10] if segments else [3, 6])
    assert text.count("'PADDING_CAUSAL'" if segments else "'CAUSAL'") == 2
    assert text.count(f"'sliding_window_length': {window or 0}") == 2
    assert text.count(f"'max_seg_per_batch': {9 if segments else 1}") == 2


def test_splash_lowers_for_a_tpu():
    ids = jnp.array(PACKED, jnp.int32)
    run = jax.jit(jax.grad(lambda *x: self_attention(*x, ids, kind="splash").sum(), (0, 1, 2)))
    text = run.trace(*inputs(width=64, dtype=jnp.bfloat16)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


@pytest.mark.parametrize(
    "kind, dtype, kwargs, words",
    [
        ("fast", jnp.float32, {}, "no attention is named 'fast'"),
        ("cudnn", jnp.float32, {}, "takes bfloat16 or float16"),
        ("cudnn", jnp.bfloat16, {}, "cuDNN is not detected"),
        ("cudnn", jnp.bfloat16, {"segment_ids": jnp.ones((2, T), jnp.int32)}, "cuDNN is not detected"),
        ("cudnn", jnp.bfloat16, {"segment_ids": jnp.ones((2, T), jnp.int32), "window": 5}, "no window in packed rows"),
        ("cudnn", jnp.bfloat16, {"window": jnp.int32(5)}, "one window for all layers"),
        ("splash", jnp.bfloat16, {"window": jnp.int32(5)}, "one window for all layers"),
    ],
)
def test_what_a_kind_cannot_do_is_said(kind, dtype, kwargs, words, monkeypatch, binding):
    monkeypatch.setattr(binding, "cuda_versions", None)
    with pytest.raises(InputError, match=words):
        self_attention(*inputs(dtype=dtype), **kwargs, kind=kind)


def test_packed_rows_need_a_hopper(fake_cudnn, monkeypatch):
    monkeypatch.setattr(attention_cudnn, "compute_capability", lambda: 8.6)
    with pytest.raises(InputError, match="takes packed rows on Hopper GPUs or newer: choose attention: blockwise"):
        self_attention(*inputs(dtype=jnp.bfloat16), segment_ids=jnp.ones((2, T), jnp.int32), kind="cudnn")


@pytest.mark.parametrize("segments", [None, PACKED])
def test_cudnn_inside_shard_map(segments, fake_cudnn):
    """Each device's rows are its own; types with varying axes are those that ``shard_map`` checks."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    ids = None if segments is None else jnp.array(segments, jnp.int32)
    run = jax.grad(lambda q, k, v, ids: self_attention(q, k, v, ids, kind="cudnn", segments=9).sum(), (0, 1, 2))
    rows = jax.sharding.PartitionSpec("data")
    whole = jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows)
    assert len(custom_calls(whole, (*inputs(width=64, dtype=jnp.bfloat16), ids))) == 2


def test_splash_takes_no_float64(x64):
    with pytest.raises(InputError, match="no float64"):
        self_attention(*inputs(dtype=jnp.float64), kind="splash")


HALF = jnp.bfloat16
BEST = [
    ("cudnn", "gpu", HALF, 64, 2048, dict(capability=9.0)),
    ("cudnn", "gpu", HALF, 64, 64, dict(capability=9.0)),
    ("cudnn", "gpu", HALF, 64, 2048, dict(capability=9.0, segments=SEGMENTS)),
    ("blockwise", "gpu", HALF, 64, 2048, dict(capability=9.0, segments=SEGMENTS + 1)),
    ("blockwise", "gpu", HALF, 64, 2048, dict(capability=8.0, segments=3)),
    ("cudnn", "gpu", HALF, 64, 2048, dict(capability=8.0)),
    ("blockwise", "gpu", HALF, 64, 2048, dict(capability=7.5)),
    ("blockwise", "gpu", jnp.float32, 64, 2048, dict(capability=9.0)),
    ("xla", "gpu", jnp.float32, 64, 100, dict(capability=9.0)),
    ("cudnn", "gpu", HALF, 256, 2048, dict(capability=9.0)),
    ("blockwise", "gpu", HALF, 256, 2048, dict(capability=8.6)),
    ("blockwise", "gpu", HALF, 60, 2048, dict(capability=9.0)),
    ("cudnn", "gpu", HALF, 64, 2048, dict(capability=9.0, windows=(512, 512))),
    ("blockwise", "gpu", HALF, 64, 2048, dict(capability=9.0, windows=(0, 512))),
    ("blockwise", "gpu", HALF, 64, 2048, dict(capability=9.0, windows=(512, 512), segments=3)),
    ("cudnn", "gpu", HALF, 64, 2048, dict(capability=9.0, partitioned=True)),
    ("blockwise", "gpu", HALF, 64, 2048, dict(capability=9.0, partitioned=True, segments=3)),
    ("blockwise", "rocm", HALF, 64, 2048, {}),
    ("splash", "tpu", HALF, 64, 2048, {}),
    ("splash", "tpu", jnp.float32, 128, 2048, dict(windows=(512,), segments=100)),
    ("blockwise", "tpu", HALF, 64, 2048, dict(partitioned=True)),
    ("blockwise", "tpu", HALF, 64, 2048, dict(windows=(0, 512))),
    ("xla", "tpu", HALF, 64, 128, {}),
    ("blockwise", "cpu", jnp.float32, 64, 256, {}),
    ("blockwise", "cpu", jnp.float64, 64, 8192, dict(windows=(0, 512), segments=1000)),
    ("xla", "cpu", jnp.float32, 64, 128, {}),
]


@pytest.mark.parametrize("kind, platform, dtype, head_dim, length, more", BEST)
def test_the_best_kind(kind, platform, dtype, head_dim, length, more):
    assert best_attention(platform, dtype, head_dim, length, **more) == kind and kind in KINDS


@pytest.mark.parametrize(
    "capability, kind", [("9.0", "cudnn"), ("7.5", "blockwise"), ("gfx942", "blockwise"), (None, "blockwise")]
)
def test_a_gpu_is_asked_what_it_is(capability, kind, monkeypatch):
    """AMD's have names for what NVIDIA numbers."""
    device = SimpleNamespace() if capability is None else SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert best_here(HALF, tiny_decoder(head_dim=8)[0].config, 256, 0) == kind


def test_packed_rows_of_a_decoder_by_cudnn(idle_cudnn):
    """As many texts as it is told, be they more than ``auto`` gives to cuDNN; told nothing, it says so."""
    model, params = tiny_decoder(max_position_embeddings=200)
    ids = jnp.repeat(jnp.arange(1, 101, dtype=jnp.int32), 2)[None]
    run = lambda **how: model.clone(dtype=jnp.bfloat16, **how).apply({"params": params}, ids % 7, segment_ids=ids)
    assert jnp.isfinite(run(attention="cudnn", segments=100)).all()
    assert jnp.isnan(run(attention="cudnn", segments=99)).all()
    with pytest.raises(InputError, match="must know how many texts a row holds at most: give Decoder's segments"):
        run(attention="cudnn")
