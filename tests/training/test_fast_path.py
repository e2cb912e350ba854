"""Laws of the whole training step: one program for many numbers, and what its buffers may hold."""

import re
from dataclasses import replace
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import LoraSpec, adapted, init_adapters
from stablelora_jax.config import optimizer as optimizer_config
from stablelora_jax.config.optimizer import CONFIGS
from stablelora_jax.config.run import RunConfig
from stablelora_jax.config.schedule import Cosine
from stablelora_jax.data import Batch, Example, make_batch
from stablelora_jax.evaluation.loglikelihood import Rows, make_compute
from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.parallel import mesh_layout, pmap_layout
from stablelora_jax.runs.build import make_hyperparams, make_optimizer, make_training
from stablelora_jax.training.loss import summed_loss
from stablelora_jax.training.step import init_state, make_train_step
from tests.helpers import TINY, largest_difference, long, tiny_decoder, trained
from tests.utils.test_matmul import operands

COMPILED: list[str] = []  # the name of every program that jax compiles from now on


def _listen(name, _, fun_name="", **more):
    if name.endswith("backend_compile_duration"):
        COMPILED.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(_listen)


def one():
    return pmap_layout(jax.devices()[:1])


SPEC = LoraSpec(
    target_modules=["q_proj", "down_proj"],
    rank=2,
    alpha=4.0,
    alpha_pattern={"down_proj": 6.0},
    rank_pattern={"layers.1.self_attn.q_proj": 1},
    dropout=0.3,
)
OTHER = replace(SPEC, alpha=1.0, alpha_pattern={"down_proj": 3.0}, dropout=0.1)


def configs(name):
    """Two runs that differ in learning rates, alphas and dropout rate alone."""
    first, config = CONFIGS[name](), RunConfig(lora=SPEC, steps=10, schedule=Cosine(warmup_steps=2))
    rates = {key: 3 * rate for key, rate in optimizer_config.learning_rates(first).items()}
    assert rates
    return replace(config, optimizer=first), replace(config, optimizer=replace(first, **rates), lora=OTHER)


def step_of(config, layout, model, params, adapters):
    """``(step, tx)`` as a run makes them."""
    tx, part = make_training(config, params, adapters)
    return make_train_step(adapted(model, config.lora), tx, layout, trained=part), tx


def batch_of(rows=4, vocab=31, longest=19, seed=0):
    rng = np.random.default_rng(seed)
    text = lambda n: Example(tuple(map(int, rng.integers(0, vocab, n))), int(rng.integers(1, n)))
    return make_batch([text(int(n)) for n in rng.integers(3, longest, rows)])


def program_of(config):
    """The step of a run before it is compiled, as text."""
    layout, model = one(), Decoder(DecoderConfig(**TINY))
    params = abstract_params(model)
    adapters = jax.eval_shape(partial(init_adapters, jax.random.key(0), spec=config.lora), params)
    step, tx = step_of(config, layout, model, params, adapters)
    numbers, batch = make_hyperparams(config, adapters), jax.eval_shape(batch_of)
    state = jax.eval_shape(lambda a: init_state(a, tx(numbers), jax.random.key(1)), adapters)
    given = ((state, "state"), (params, "base"), (batch, "rows"), (numbers, "base"))
    return step.lower(*(layout.abstract(x, takes) for x, takes in given)).as_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_runs_that_differ_in_numbers_are_one_program(name):
    """The second finds the first one's program in the cache of compiled programs, even in another process."""
    first, second = (program_of(config) for config in configs(name))
    assert first == second


def test_without_dropout_there_is_one_more_program():
    off = [replace(config, lora=replace(config.lora, dropout=0.0)) for config in configs("adamw")]
    first, second = (program_of(config) for config in off)
    assert first == second != program_of(configs("adamw")[0])


@pytest.mark.parametrize(
    "name",
    ["stable_lora", *(pytest.param(name, marks=pytest.mark.long) for name in ("adamw", "lora_pro", "lora_rite"))],
)
def test_one_compilation_gives_what_constants_give(name):
    """Learning rate, alphas, a pattern of them and dropout rates, traced; against steps with each as a constant."""
    layout, (model, params) = one(), tiny_decoder(num_hidden_layers=2)
    begun = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    placed, rows = layout.place_base(params), layout.split(batch_of())
    runs = configs(name)
    step, tx = step_of(runs[0], layout, model, params, begun)
    start = lambda tx: layout.place_state(jax.tree.map(np.asarray, init_state(begun, tx, jax.random.key(1))))

    def go(step, state, *numbers):
        losses = []
        for _ in range(3):
            state, metrics = step(state, placed, rows, *numbers)
            losses.append(float(layout.fetch(metrics)["loss"]))
        return layout.fetch(state).adapters, losses

    found = []
    for config in runs:
        numbers = make_hyperparams(config, begun)
        state, given = start(tx(numbers)), layout.place_base(numbers)
        before = COMPILED.count("jit(_fun)")
        found.append(go(step, state, given))
        assert COMPILED.count("jit(_fun)") - before == (config is runs[0]), "one compilation for all"
    assert largest_difference(found[0][0], found[1][0]) > 1e-4 and found[0][1][0] != found[1][1][0]
    config = runs[1]
    fixed = make_optimizer(config, begun)
    adapters, losses = go(make_train_step(adapted(model, config.lora), fixed, layout), start(fixed))
    np.testing.assert_allclose(found[1][1], losses, rtol=1e-6)
    assert largest_difference(found[1][0], adapters) < 1e-6


# -- buffers of the compiled step. No two of these numbers are equal, and none is a multiple of V.
B, T, V, L, D, F, H, K, HD = 5, 131, 101, 3, 24, 36, 4, 2, 10
SIZES = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=L,
    num_attention_heads=H,
    num_key_value_heads=K,
    head_dim=HD,
)
KERNELS = {(D, H * HD), (D, K * HD), (H * HD, D), (D, F), (F, D)}
ALL = LoraSpec(target_modules="all-linear", rank=2, dropout=0.1)


def shapes_of(spec, tied=False, layers=L, windows=(), **options):
    """``(model, shapes of its parameters, of adapters)``."""
    sizes = {**TINY, **SIZES, "num_hidden_layers": layers, "windows": windows}
    config = DecoderConfig(**sizes, tie_word_embeddings=tied)
    model = Decoder(config, **options)
    params = abstract_params(model)
    return model, params, jax.eval_shape(partial(init_adapters, jax.random.key(0), spec=spec), params)


def lowered(layout, spec=ALL, rows=B, places=None, **options):
    """``(the step for shapes alone, bytes of the state)``."""
    (model, params, adapters), tx = shapes_of(spec, **options), optax.adamw(1e-3)
    state = jax.eval_shape(lambda a: init_state(a, tx, jax.random.key(1)), adapters)
    at = places and jax.ShapeDtypeStruct((rows, places), jnp.int32)
    batch = Batch(*[jax.ShapeDtypeStruct((rows, T), jnp.int32)] * 4, at)
    step = make_train_step(adapted(model, spec), tx, layout)
    taken = layout.abstract(state, "state"), layout.abstract(params, "base"), layout.abstract(batch, "rows")
    return step.lower(*taken), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def instructions(text):
    """``(opcode, shapes of its results)`` of every instruction of an optimised program."""
    for line in text.splitlines():
        found = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\(", line)
        if found:
            yield found[2], [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", found[1])]


def most_logits(text, vocabulary=V):
    """The most tokens whose logits a buffer holds; an axis may be joined with that of V."""
    with_v = [s for _, shapes in instructions(text) for s in shapes if any(n % vocabulary == 0 for n in s)]
    return max(prod(s) // vocabulary for s in with_v)


@pytest.fixture(scope="module", params=["untied", long("tied")])
def program(request):
    """The compiled step on one device, with attention in tiles: ``(compiled, text, bytes of the state)``."""
    step, state = lowered(one(), attention="blockwise", tied=request.param == "tied")
    compiled = step.compile()
    return compiled, compiled.as_text(), state


def test_no_buffer_holds_the_logits_of_a_quarter_of_the_tokens(program):
    assert B * T // 16 < most_logits(program[1]) < B * T / 4, "and there is a tile of them"


@pytest.mark.long
def test_a_quarter_learnt_takes_a_quarter_of_the_tiles():
    """As large as those of a whole row: each tile reads the head from memory."""
    places = T // 4
    tokens = most_logits(lowered(one(), attention="blockwise", places=places)[0].compile().as_text())
    assert B * places / 4 < tokens < B * T / 4


def test_no_buffer_has_two_axes_of_t(program):
    shapes = {shape for _, shapes in instructions(program[1]) for shape in shapes}
    assert max(sum(n >= T for n in shape) for shape in shapes) == 1
    assert any(T in shape for shape in shapes)


OTHERS = [{"segments": 1}, {"remat": "nothing"}, {"windows": (0, 40, 40)}, {"windows": (40,) * L}]


@pytest.mark.parametrize("options", [{}, *map(long, OTHERS)])
def test_no_buffer_grows_with_the_square_of_t(options):
    """Nor one that splits both axes into tiles: what each pair of tiles needs, say a mask, is had when it is needed."""
    text = lowered(one(), attention="blockwise", **options)[0].compile().as_text()
    largest = max((prod(shape), shape) for _, shapes in instructions(text) for shape in shapes)
    assert L * B * T * D <= largest[0] < B * H * T**2 / 4, largest


def test_no_gradient_of_a_frozen_kernel(program):
    """Nothing computes an array of the shape of all layers' kernels, nor multiplies to that of one layer's."""
    made = [(opcode, shape) for opcode, shapes in instructions(program[1]) for shape in shapes]
    handed = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "copy", "call", "conditional"}
    assert not [(op, s) for op, s in made if s[:1] == (L,) and s[1:] in KERNELS and op not in handed]
    products = [s for op, s in made if op in ("dot", "custom-call")]
    turned = KERNELS | {kernel[::-1] for kernel in KERNELS} | {(D, V), (V, D)}
    assert products and not [s for s in products if tuple(n for n in s if n > 1) in turned]
    assert {s for op, s in made if op == "parameter"} >= {(L, *kernel) for kernel in KERNELS}


def test_the_state_is_updated_in_place(program):
    assert program[0].memory_analysis().alias_size_in_bytes >= program[2] > 0


@pytest.mark.long
def test_on_a_mesh_no_device_holds_the_logits_of_a_quarter_of_its_tokens():
    """Rows stay where they are: a tile takes some tokens of every row."""
    layout = mesh_layout(2, 2, 2, key_value_heads=K)
    tokens = most_logits(lowered(layout, rows=8, attention="blockwise")[0].compile().as_text())
    assert 8 * T // 4 // 16 < tokens < 8 * T // 4 / 4


def test_scoring_never_holds_the_logits_of_a_quarter_of_the_tokens():
    places, programs = 89, []
    layout, (model, params, adapters) = one(), shapes_of(ALL, attention="blockwise")
    keep = lambda *given: programs.append(layout.compile(*given)) or programs[0]
    make_compute(adapted(model, ALL), replace(layout, compile=keep))
    row, at = (jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (T, places))
    place = layout.abstract
    taken = place(params, "base"), place({"lora": adapters}, "state"), place(Rows(row, at, at, at), "rows")
    tokens = most_logits(programs[0].lower(*taken).compile().as_text())
    assert B * places // 16 < tokens < B * places / 4


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_never_meets_float32_in_a_product(tied):
    """What a product multiplies has one dtype, forwards and backwards: an accelerator would widen the other."""
    model, params, adapters = shapes_of(ALL, tied, dtype=jnp.bfloat16, attention="blockwise")

    def loss(adapters, params, row):
        keys = jax.random.split(jax.random.key(0), B)
        variables = {"params": params, "lora": adapters}
        return summed_loss(adapted(model, ALL), variables, Batch(row, row, row, row), keys)

    row = jax.ShapeDtypeStruct((B, T), jnp.int32)
    found = operands(jax.grad(loss), adapters, params, row)
    assert any(V in shape for pair in found for shape, _ in pair)
    assert not [pair for pair in found if {dtype for _, dtype in pair} != {"bfloat16"}]


@pytest.mark.parametrize("remat", [long("save_dots"), "nothing"])
def test_the_program_does_not_grow_with_depth(remat):
    """Nor what is kept: layers are a scan, forwards and backwards."""
    few, many = (lowered(one(), layers=layers, remat=remat)[0].as_text().count("\n") for layers in (4, 32))
    assert few == many
