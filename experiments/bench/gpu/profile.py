"""A profile of our training step, by part of the model and by kernel.

On a GPU two programs are profiled: one compiled without command buffers (CUDA graphs), since the kernels in a graph are
not attributed to instructions; and, as ``with_command_buffers``, the program that training runs.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import jax

from bench.gpu.parts import PARTS, op_names_of
from bench.gpu.trace import events_of, summarize_trace
from bench.gpu.training import work_of
from bench.ours import StepSetup, local_devices, make_step
from stablelora_jax.parallel import pmap_layout

GPUS = ("gpu", "cuda")
WITHOUT = {"xla_gpu_enable_command_buffer": ""}


def profile(
    *,
    shape: str,
    batch: int,
    length: int,
    documents: int,
    rank: int,
    dtype: str,
    optimizer: str,
    steps: int,
    toy: bool = False,
) -> dict[str, Any]:
    """Shares of device time, idle time and longest kernels of ``steps`` training steps, by :func:`summarize_trace`.

    ``step_milliseconds`` is the wall time per step of as many untraced steps before them.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # cached programs lack the names of operations
    given = {"batch": batch, "length": length, "documents": documents, "rank": rank, "dtype": dtype}
    work = work_of(toy, shape=shape, optimizer=optimizer, devices=1, **given)
    device = local_devices(work)[0]
    made = make_step(work, pmap_layout([device]))
    lowered = made.step.lower(made.state, made.params, made.batch, made.numbers)
    metadata = {"platform": device.platform, "device": device.device_kind, "steps": steps}
    if device.platform not in GPUS:
        return {**metadata, **_profile_steps(lowered.compile(), made, steps)[0]}
    try:
        found, made = _profile_steps(lowered.compile(compiler_options=WITHOUT), made, steps)
    except jax.errors.JaxRuntimeError as error:  # this version of XLA does not have the option
        if "xla_gpu_enable_command_buffer" not in str(error):
            raise
        return {**metadata, **_profile_steps(lowered.compile(), made, steps)[0], "with_command_buffers": None}
    return {**metadata, **found, "with_command_buffers": _profile_as_compiled(lowered, made, steps)}


def _profile_as_compiled(lowered: Any, made: StepSetup, steps: int) -> dict[str, Any]:
    """The profile of the program as training compiles it; an error becomes ``why``: the first profile is kept."""
    try:
        return _profile_steps(lowered.compile(), made, steps)[0]
    except Exception as error:
        return {"why": f"{type(error).__name__}: {error}"[:300]}


def _profile_steps(compiled: Any, made: StepSetup, steps: int) -> tuple[dict[str, Any], StepSetup]:
    """Time the steps of a program untraced, then traced; returns the numbers and the setup with the new state."""
    state = made.state

    def run(count: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(count):
            state, metrics = compiled(state, made.params, made.batch, made.numbers)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    run(2)
    wall = run(steps)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run(steps)
        found = summarize_trace(events_of(folder), op_names_of(compiled.as_text()), steps)
    return {"step_milliseconds": 1e3 * wall / steps, **found}, made._replace(state=state)


def table(found: dict[str, Any]) -> str:
    """The result of :func:`profile` as Markdown."""
    lines = [f"{found['device']}: {found['step_milliseconds']:.2f} ms per step, {_traced(found)}.", ""]
    graphs = found.get("with_command_buffers")
    if graphs and "why" not in graphs:
        lines[0] += f" With command buffers: {graphs['step_milliseconds']:.2f} ms per step, {_traced(graphs)}."
    elif graphs:
        lines[0] += f" With command buffers: {graphs['why']}"
    lines += ["| part | ms per step | share |", "|---|---:|---:|"]
    lines += [f"| {part} | {found['milliseconds'][part]:.3f} | {found['shares'][part]:.1%} |" for part in PARTS]
    lines += [f"| idle (share of the traced time) | {found['idle_milliseconds']:.3f} | {found['idle']:.1%} |", ""]
    lines += ["| kernel | ms per step | calls per step | share | part | operation |", "|---|---:|---:|---:|---|---|"]
    for one in found["kernels"]:
        name, operation = (one[key].replace("|", "\\|") for key in ("name", "operation"))
        numbers = f"{one['milliseconds']:.3f} | {one['calls']:g} | {one['share']:.1%}"
        lines.append(f"| `{name}` | {numbers} | {one['part']} | {f'`{operation}`' if operation else ''} |")
    return "\n".join(lines)


def _traced(found: dict[str, Any]) -> str:
    times = f"{found['traced_milliseconds']:.2f} ms traced, {found['idle']:.1%} of it idle"
    return f"{times}; {found['guessed']:.1%} of device time assigned to a part by the kernel's name only"
