"""Schedules from a file: each against a float64 transcription of its documented rule, transformers and torch."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, config
from stablelora_jax.config import option, section
from stablelora_jax.config.help import meanings_of
from stablelora_jax.config.keys import keys_of, sections
from stablelora_jax.config.run import RunConfig
from stablelora_jax.config.schedule import (
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    Linear,
    OneCycle,
    Piecewise,
    Polynomial,
    Restarts,
    ScheduleConfig,
    Wsd,
    schedule_of,
    warmup_of,
)
from stablelora_jax.runs.build import make_schedule
from tests.helpers import exact_jit as jit

PEAK, STEPS = 3e-4, 60


def cosine(t, length, end=0.0, exponent=1.0):
    return end + (1 - end) * (0.5 * (1 + math.cos(math.pi * min(t, length) / length))) ** exponent


def polynomial(t, length, power=1.0, end=0.0, hold=0):
    return end + (1 - end) * (1 - min(max(t - hold, 0), length) / length) ** power


def exponential(t, length, rate=0.1, stairs=False, end=0.0, hold=0):
    way = max(t - hold, 0) / length
    return max(end, rate ** (math.floor(way) if stairs else way))


def interpolated(t, points, kind):
    """Linear or cosine from (0, 1) through ``points``; constant beyond the last."""
    (place, share), *rest = [(0, 1.0), *points]
    for step, value in rest:
        if t < step:
            way = (t - place) / (step - place)
            return share + (value - share) * (way if kind == "linear" else (1 - math.cos(math.pi * way)) / 2)
        place, share = step, value
    return share


def jumps(t, points):
    return next((share for step, share in reversed(points) if t >= step), 1.0)


def restarts(t, cycles, warmup=0, end=0.0, exponent=1.0):
    """``cycles`` of (peak, length), rising from ``end`` for ``warmup`` steps in all but the first."""
    for number, (peak, length) in enumerate(cycles):
        if t < length or number == len(cycles) - 1:
            rise = warmup * (number > 0)
            if t < rise:
                return end + (peak - end) * t / rise
            return peak * cosine(t - rise, length - rise, end / peak, exponent)
        t -= length


def one_cycle(t, places, start, end, linear=False):
    points = [(0, start), (places[0], 1.0), *([(places[1], start)] if linear else []), (places[-1], end)]
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if t < b:
            way = (t - a) / (b - a)
            return low + (high - low) * (way if linear else (1 - math.cos(math.pi * way)) / 2)
    return end


def wsd(t, stable, length, shape, end=0.0):
    way = min(max(t - stable, 0), length) / length
    return end + (1 - end) * {"cosine": cosine(way, 1), "linear": 1 - way, "sqrt": 1 - math.sqrt(way)}[shape]


# config, rule of the steps after the warm-up, steps of the warm-up
CASES = {
    "constant": (Constant(), lambda t: 1.0, 0),
    "constant_warm": (Constant(warmup_steps=7, warmup_start=0.2), lambda t: 1.0, 7),
    "linear": (Linear(warmup_steps=10), lambda t: polynomial(t, 50), 10),
    "linear_end": (Linear(end=0.1, decay_steps=20, warmup_ratio=0.07), lambda t: polynomial(t, 20, end=0.1), 5),
    "cosine": (Cosine(warmup_steps=10), lambda t: cosine(t, 50), 10),
    "cosine_all": (
        Cosine(warmup_steps=3, warmup_start=0.5, end=0.1, exponent=1.7, decay_steps=30),
        lambda t: cosine(t, 30, 0.1, 1.7),
        3,
    ),
    "cosine_long": (Cosine(decay_steps=100), lambda t: cosine(t, 100), 0),
    "all_warmup": (Linear(warmup_steps=60), lambda t: polynomial(t, 1), 60),
    "polynomial": (
        Polynomial(power=2.5, end=0.05, warmup_steps=10, hold_steps=8),
        lambda t: polynomial(t, 42, 2.5, 0.05, 8),
        10,
    ),
    "exponential": (Exponential(warmup_steps=10), lambda t: exponential(t, 50), 10),
    "exponential_all": (
        Exponential(decay_rate=0.5, decay_steps=12, end=0.2, hold_steps=5),
        lambda t: exponential(t, 12, 0.5, False, 0.2, 5),
        0,
    ),
    "staircase": (
        Exponential(decay_rate=0.5, decay_steps=12, staircase=True, warmup_steps=4),
        lambda t: exponential(t, 12, 0.5, True),
        4,
    ),
    "piecewise": (
        Piecewise(points={20: 0.5, 40: 0.7, 50: 0.0}, warmup_steps=10),
        lambda t: jumps(t, [(10, 0.5), (30, 0.7), (40, 0.0)]),
        10,
    ),
    "piecewise_linear": (
        Piecewise(points={50: 0.1, 20: 0.5}, warmup_steps=10, between="linear"),
        lambda t: interpolated(t, [(10, 0.5), (40, 0.1)], "linear"),
        10,
    ),
    "piecewise_cosine": (
        Piecewise(points={20: 0.5, 50: 0.0}, between="cosine"),
        lambda t: interpolated(t, [(20, 0.5), (50, 0.0)], "cosine"),
        0,
    ),
    "restarts": (
        Restarts(cycles=3, warmup_steps=6),
        lambda t: restarts(t, [(1, 18), (1, 18), (1, 18)]),
        6,
    ),
    "restarts_all": (
        Restarts(cycles=3, growth=2.0, cycle_peak=0.5, cycle_warmup_steps=2, end=0.1, exponent=1.3, warmup_steps=4),
        lambda t: restarts(t, [(1, 8), (0.5, 16), (0.25, 32)], 2, 0.1, 1.3),
        4,
    ),
    "inverse_sqrt": (InverseSqrt(warmup_steps=10), lambda t: (1 + t / 10) ** -0.5, 10),
    "inverse_sqrt_own": (InverseSqrt(timescale=30, warmup_steps=40), lambda t: (1 + t / 30) ** -0.5, 40),
    "inverse_sqrt_bare": (InverseSqrt(), lambda t: (1 + t / 10_000) ** -0.5, 0),
    "wsd": (Wsd(warmup_steps=10), lambda t: wsd(t, 44, 6, "cosine"), 10),
    "wsd_linear": (
        Wsd("wsd", 10, decay="linear", decay_steps=20, end=0.1),
        lambda t: wsd(t, 30, 20, "linear", 0.1),
        10,
    ),
    "wsd_sqrt": (Wsd(decay="sqrt", decay_steps=25, end=0.02), lambda t: wsd(t, 35, 25, "sqrt", 0.02), 0),
    "one_cycle": (OneCycle(), lambda t: one_cycle(t, [18, 60], 0.04, 4e-6), 0),
    "one_cycle_linear": (
        OneCycle(between="linear", rise=0.25, fall=0.5, start=0.1, end=0.01, cycle_steps=40),
        lambda t: one_cycle(t, [10, 20, 40], 0.1, 0.01, linear=True),
        0,
    ),
}


def values(schedule, counts):
    """Of a schedule compiled once, with traced counts."""
    compiled = jit(schedule)
    out = [compiled(jnp.int32(count)) for count in counts]
    assert {x.dtype for x in out} == {np.dtype(np.float32)} and {x.shape for x in out} == {()}
    return np.array(out, np.float64)


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_the_rule(name):
    shape, rule, warmup = CASES[name]
    counts = [*range(STEPS + 3), 3 * STEPS, 10**6]
    start = getattr(shape, "warmup_start", None)
    expected = [start + (1 - start) * t / warmup if t < warmup else rule(t - warmup) for t in counts]
    schedule = schedule_of(shape, PEAK, STEPS)
    np.testing.assert_allclose(values(schedule, counts) / PEAK, expected, rtol=2e-5, atol=5e-7)
    np.testing.assert_allclose([schedule(t) for t in counts[::9]], values(schedule, counts[::9]), rtol=1e-6, atol=1e-12)
    assert warmup_of(shape, STEPS) == warmup


def test_every_member_has_a_case_and_every_key_a_meaning():
    assert {type(shape) for shape, _, _ in CASES.values()} == set(sections(ScheduleConfig))
    for member in sections(ScheduleConfig):
        first, *keys = keys_of(member)
        assert first == "name" and member.__doc__ and all(meanings_of(member)[key] for key in keys)


@pytest.mark.parametrize("peak,warmup,steps", [(1e-4, 20, 300), (3e-3, 0, 7), (0.7, 5, 5), (1e-3, 1, 2)])
def test_the_first_three_are_what_they_were_to_the_bit(peak, warmup, steps):
    rest = max(1, steps - warmup)
    before = {
        Constant: optax.constant_schedule(peak),
        Linear: optax.linear_schedule(peak, 0.0, rest),
        Cosine: optax.cosine_decay_schedule(peak, rest),
    }
    for member, after in before.items():
        old = optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])
        new = schedule_of(member(warmup_steps=warmup), peak, steps)
        for compiled in (lambda s: s, jit):
            a, b = compiled(old), compiled(new)
            for t in range(steps + 3):
                x, y = a(jnp.int32(t)), b(jnp.int32(t))
                assert np.array_equal(x, y) and (x.dtype, x.weak_type) == (y.dtype, y.weak_type), (member, t)


def lambda_of(scheduler):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return scheduler(optimizer).lr_lambdas[0]


def hf(name, **options):
    def factor():
        optimization = pytest.importorskip("transformers.optimization")
        return lambda_of(lambda optimizer: getattr(optimization, name)(optimizer, **options))

    return factor


def torch_one_cycle():
    """torch turns at ``pct * total - 1`` and ends at ``total - 1``: ours is one step longer."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=STEPS + 1, pct_start=19 / (STEPS + 1))
    rates = []
    for _ in range(STEPS + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step() if len(rates) <= STEPS else None
    return rates.__getitem__


def torch_staircase():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.6)
    rates = []
    for _ in range(STEPS + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates.__getitem__


RUN = dict(num_warmup_steps=10, num_training_steps=STEPS)
PEERS = {
    "constant": (Constant(warmup_steps=10), hf("get_constant_schedule_with_warmup", num_warmup_steps=10)),
    "linear": (Linear(warmup_steps=10), hf("get_linear_schedule_with_warmup", **RUN)),
    "cosine": (Cosine(warmup_steps=10), hf("get_cosine_schedule_with_warmup", **RUN)),
    "cosine_end": (
        Cosine(warmup_steps=10, end=0.1),
        hf("get_cosine_with_min_lr_schedule_with_warmup", **RUN, min_lr_rate=0.1),
    ),
    "polynomial": (
        Polynomial(warmup_steps=10, power=2.0, end=0.01),
        hf("get_polynomial_decay_schedule_with_warmup", **RUN, power=2.0, lr_end=0.01),
    ),
    "restarts": (
        Restarts(warmup_steps=10, cycles=5),
        hf("get_cosine_with_hard_restarts_schedule_with_warmup", **RUN, num_cycles=5),
    ),
    "inverse_sqrt": (InverseSqrt(warmup_steps=10), hf("get_inverse_sqrt_schedule", num_warmup_steps=10)),
    "inverse_sqrt_own": (
        InverseSqrt(warmup_steps=10, timescale=25),
        hf("get_inverse_sqrt_schedule", num_warmup_steps=10, timescale=25),
    ),
    **{
        f"wsd_{ours}": (
            Wsd(warmup_steps=10, decay=ours, decay_steps=20, end=0.1, warmup_start=0.1),
            hf("get_wsd_schedule", **RUN, num_decay_steps=20, decay_type=theirs, min_lr_ratio=0.1),
        )
        for ours, theirs in (("cosine", "cosine"), ("linear", "linear"), ("sqrt", "1-sqrt"))
    },
    "one_cycle": (OneCycle(), torch_one_cycle),
    "staircase": (Exponential(staircase=True, decay_steps=7, decay_rate=0.6), torch_staircase),
}


@pytest.mark.parametrize("name", PEERS)
def test_as_transformers_and_torch_have_it(name):
    shape, make = PEERS[name]
    theirs, schedule = make(), jit(schedule_of(shape, 1.0, STEPS))
    ours = [schedule(jnp.int32(t)) for t in range(STEPS + 1)]
    np.testing.assert_allclose(ours, [theirs(t) for t in range(STEPS + 1)], atol=2e-6)


@pytest.mark.parametrize("steps,ratio", [(100, 0.07), (300, 0.03), (7, 0.5), (10, 0.0), (60, 1.0), (1000, 0.0001)])
def test_a_warmup_ratio_is_rounded_up(steps, ratio):
    exact = {(100, 0.07): 7}.get((steps, ratio), math.ceil(steps * ratio))  # in floats the first is a little more
    assert warmup_of(Linear(warmup_ratio=ratio), steps) == exact


@pytest.mark.parametrize("name", CASES)
def test_a_traced_peak_gives_the_same(name):
    shape, _, _ = CASES[name]
    swept = jit(lambda peak, count: schedule_of(shape, peak, STEPS)(count))
    fixed = schedule_of(shape, PEAK, STEPS)
    for t in (0, 11, 45, STEPS):
        np.testing.assert_allclose(swept(jnp.float32(PEAK), jnp.int32(t)), fixed(t), rtol=1e-5, atol=1e-11)


def test_float32_under_x64(x64):
    for shape, _, _ in CASES.values():
        assert schedule_of(shape, PEAK, STEPS)(jnp.int32(13)).dtype == np.float32


def test_an_optimizer_follows_it():
    tx = optax.sgd(schedule_of(Piecewise(points={2: 0.5, 3: 0.1}, between="linear"), 1.0, 4))
    state = tx.init(jnp.zeros(()))
    seen = []
    for _ in range(5):
        update, state = tx.update(jnp.ones(()), state)
        seen.append(-float(update))
    np.testing.assert_allclose(seen, [1, 0.75, 0.5, 0.1, 0.1], rtol=1e-6)


@dataclass(frozen=True)
class Run:
    schedule: ScheduleConfig = section(Cosine, "the learning rate over the run")
    steps: int = option(60, "optimizer steps")


def load(*overrides, path=None):
    return config.load(Run, path, overrides)


def test_a_file_picks_it_by_name(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("schedule: {name: cosine, warmup_steps: 10, end: 0.1}\n")
    assert load(path=path).schedule == Cosine(warmup_steps=10, end=0.1)
    assert load("schedule.name=linear", path=path).schedule == Linear()
    assert load("schedule={name: warmup_stable_decay, decay: sqrt}").schedule == Wsd(
        "warmup_stable_decay", decay="sqrt"
    )
    points = "schedule={name: piecewise, points: {30: 0.5, 40: 0}, between: linear}"
    assert load(points).schedule == Piecewise(points={30: 0.5, 40: 0.0}, between="linear")
    for shape, _, _ in CASES.values():
        path.write_text(config.dump(Run(schedule=shape)))
        assert load(path=path) == Run(schedule=shape)
    assert "  one_cycle: " in config.help_text(Run, "schedule")
    assert "schedule.end: float at least 0 and at most 1 = 0.0" in config.help_text(Run, "schedule.cosine")


@pytest.mark.parametrize(
    "given,message",
    [
        ("{name: sine}", "schedule.name wants constant |"),
        ("{name: cosine, ends: 0.1}", "schedule.ends is not a key"),
        ("{name: linear, end: 1.5}", "schedule.end must be at least 0 and at most 1, not 1.5"),
        ("{name: cosine, warmup_steps: -1}", "schedule.warmup_steps must be at least 0, not -1"),
        ("{name: cosine, warmup_ratio: 2}", "schedule.warmup_ratio must be at least 0 and at most 1, not 2"),
        ("{name: cosine, warmup_start: -0.1}", "schedule.warmup_start must be at least 0 and at most 1, not -0.1"),
        ("{name: cosine, warmup_ratio: 0.1, warmup_steps: 3}", "schedule: give warmup_steps or warmup_ratio, not both"),
        ("{name: cosine, exponent: 0}", "schedule.exponent must be above 0, not 0"),
        ("{name: linear, decay_steps: 0}", "schedule.decay_steps must be at least 1 or null, not 0"),
        ("{name: exponential, decay_rate: 1}", "schedule.decay_rate must be above 0 and below 1, not 1"),
        ("{name: polynomial, hold_steps: -1}", "schedule.hold_steps must be at least 0, not -1"),
        ("{name: inverse_sqrt, timescale: 0}", "schedule.timescale must be at least 1 or null, not 0"),
        ("{name: cosine_with_restarts, cycles: 0}", "schedule.cycles must be at least 1"),
        ("{name: cosine_with_restarts, cycle_peak: 1.1}", "schedule.cycle_peak must be above 0 and at most 1, not 1.1"),
        ("{name: one_cycle, start: 0}", "schedule.start must be above 0 and at most 1, not 0"),
        ("{name: one_cycle, end: 0}", "schedule.end must be above 0 and at most 1, not 0"),
        ("{name: one_cycle, end: 0.1}", "schedule: end must be in (0, start], not 0.1, since start is 0.04"),
        ("{name: one_cycle, between: linear, rise: 0.5, fall: 0.5}", "schedule: fall must be above rise, which is 0.5"),
        ("{name: cosine_with_restarts, cycles: 3, cycle_peak: 0.5, end: 0.25}", "schedule: end must be below 0.25"),
        ("{name: one_cycle, cycle_steps: 2}", "schedule: rise: a cycle of 2 steps would turn at [0]"),
        ("{name: one_cycle, warmup_steps: 3}", "schedule.warmup_steps is not a key"),
        ("{name: piecewise}", "schedule.points is missing"),
        ("{name: piecewise, points: {}}", "schedule: points is empty"),
        ("{name: piecewise, points: {3: 2.0}}", "schedule.points.3 must be at least 0 and at most 1, not 2.0"),
        ("{name: piecewise, points: {3: 0, 5: 0.5}}", "schedule: points[3] is 0, which only the last may be"),
        ("{name: piecewise, points: {10: 0.5}, warmup_steps: 10}", "schedule: points must lie after step 10"),
        ("{name: piecewise, points: {early: 0.5}}", "schedule.points: its key wants int, got 'early'"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_key(given, message):
    with pytest.raises(InputError) as caught:
        load(f"schedule={given}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shape,message",
    [
        (Cosine(warmup_steps=61), "schedule.warmup_steps must be in [0, 60], not 61"),
        (Polynomial(warmup_steps=10, hold_steps=50), "schedule.hold_steps must be below 50"),
        (Exponential(hold_steps=60), "schedule.hold_steps must be below 60"),
        (Wsd(warmup_steps=10, decay_steps=51), "schedule.decay_steps must be at most 50"),
        (Piecewise(points={10: 0.5}, warmup_ratio=0.2), "schedule.points must lie after step 12"),
        (Restarts(cycles=61), "schedule.cycles: 61 do not fit into 60 steps"),
        (Restarts(cycles=6, cycle_warmup_steps=10), "schedule.cycles: 6 do not fit"),
        (OneCycle(rise=0.01), "schedule.rise: a cycle of 60 steps would turn at [0]"),
        (
            OneCycle(between="linear", rise=0.3, fall=0.31),
            "schedule.rise and fall: a cycle of 60 steps",
        ),
    ],
)
def test_what_does_not_fit_the_run_is_refused(shape, message):
    with pytest.raises(InputError) as caught:
        schedule_of(shape, PEAK, STEPS)
    assert message in str(caught.value)


def test_the_run_uses_it():
    chosen = replace(RunConfig(), schedule=Cosine(warmup_steps=10, end=0.1), steps=STEPS)
    own, other = make_schedule(chosen), make_schedule(chosen, 2.0)
    expected = schedule_of(chosen.schedule, chosen.optimizer.learning_rate, STEPS)
    assert [own(t) for t in (0, 5, 30, 70)] == [expected(t) for t in (0, 5, 30, 70)]
    np.testing.assert_allclose(other(70), 0.2, rtol=1e-6)


EVERY = [
    Constant(warmup_steps=3),
    Linear(end=0.1, warmup_ratio=0.2),
    Cosine(end=0.1, exponent=2.0, warmup_steps=2, warmup_start=0.5),
    Polynomial(power=2.0, end=0.1, hold_steps=3),
    Exponential(decay_rate=0.5, decay_steps=4, end=0.2),
    Exponential(staircase=True, decay_steps=4),
    Piecewise(points={5: 0.5, 9: 0.1}),
    Piecewise(points={5: 0.5, 9: 0.1}, between="linear"),
    Piecewise(points={5: 0.5, 9: 0.1}, between="cosine"),
    Restarts(cycles=2, cycle_peak=0.5, cycle_warmup_steps=2, end=0.1),
    InverseSqrt(warmup_steps=4),
    Wsd(decay="cosine", decay_steps=5),
    Wsd(decay="linear", end=0.1, decay_steps=5),
    Wsd(decay="sqrt", decay_steps=5),
    OneCycle(),
    OneCycle(between="linear"),
]


def test_every_schedule_takes_a_traced_peak():
    """One program for all peaks, equal to the schedule of each; all kinds are here."""
    assert {type(config) for config in EVERY} == set(sections(ScheduleConfig))
    counts = range(22)
    traced = jax.jit(lambda peak: [[schedule_of(config, peak, 20)(count) for count in counts] for config in EVERY])
    for peak in (1e-4, 0.03):
        expected = [[schedule_of(config, peak, 20)(count) for count in counts] for config in EVERY]
        np.testing.assert_allclose(np.array(traced(jnp.float32(peak))), np.array(expected), rtol=2e-6, atol=1e-12)
