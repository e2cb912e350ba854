"""Where the time of our training step goes, by parts of the model and by kernels.

On a GPU two programs are profiled: one compiled without command buffers (CUDA graphs), since kernels in those do not
say which instruction they are, and then, under ``with_command_buffers``, the one that training runs.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import jax

from bench.gpu.parts import PARTS, op_names_of
from bench.gpu.trace import events_of, reduced
from bench.gpu.training import work_of
from bench.ours import Ready, local_devices, ready
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
    """Shares of device time, the idle time and the longest kernels of ``steps`` training steps; see :func:`reduced`.

    ``step_milliseconds`` is the wall time of as many steps before them that nothing traces.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # it knows programs without the names of operations
    given = {"batch": batch, "length": length, "documents": documents, "rank": rank, "dtype": dtype}
    work = work_of(toy, shape=shape, optimizer=optimizer, devices=1, **given)
    device = local_devices(work)[0]
    made = ready(work, pmap_layout([device]))
    lowered = made.step.lower(made.state, made.params, made.batch, made.numbers)
    about = {"platform": device.platform, "device": device.device_kind, "steps": steps}
    if device.platform not in GPUS:
        return {**about, **_measured(lowered.compile(), made, steps)[0]}
    try:
        found, made = _measured(lowered.compile(compiler_options=WITHOUT), made, steps)
    except jax.errors.JaxRuntimeError as error:  # an option that this compiler does not know
        if "xla_gpu_enable_command_buffer" not in str(error):
            raise
        return {**about, **_measured(lowered.compile(), made, steps)[0], "with_command_buffers": None}
    return {**about, **found, "with_command_buffers": _as_it_runs(lowered, made, steps)}


def _as_it_runs(lowered: Any, made: Ready, steps: int) -> dict[str, Any]:
    """The same of the program as training compiles it, or why not: what is there already must not be lost."""
    try:
        return _measured(lowered.compile(), made, steps)[0]
    except Exception as error:
        return {"why": f"{type(error).__name__}: {error}"[:300]}


def _measured(compiled: Any, made: Ready, steps: int) -> tuple[dict[str, Any], Ready]:
    """What the steps of one program take, untraced and then traced; and where they have led."""
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
        found = reduced(events_of(folder), op_names_of(compiled.as_text()), steps)
    return {"step_milliseconds": 1e3 * wall / steps, **found}, made._replace(state=state)


def table(found: dict[str, Any]) -> str:
    """What :func:`profile` gives, as Markdown."""
    lines = [f"{found['device']}: {found['step_milliseconds']:.2f} ms a step, {_traced(found)}.", ""]
    graphs = found.get("with_command_buffers")
    if graphs and "why" not in graphs:
        lines[0] += f" With command buffers: {graphs['step_milliseconds']:.2f} ms a step, {_traced(graphs)}."
    elif graphs:
        lines[0] += f" With command buffers: {graphs['why']}"
    lines += ["| part | ms a step | share |", "|---|---:|---:|"]
    lines += [f"| {part} | {found['milliseconds'][part]:.3f} | {found['shares'][part]:.1%} |" for part in PARTS]
    lines += [f"| idle, of the traced time | {found['idle_milliseconds']:.3f} | {found['idle']:.1%} |", ""]
    lines += ["| kernel | ms a step | calls | share | part | operation |", "|---|---:|---:|---:|---|---|"]
    for one in found["kernels"]:
        name, operation = (one[key].replace("|", "\\|") for key in ("name", "operation"))
        numbers = f"{one['milliseconds']:.3f} | {one['calls']:g} | {one['share']:.1%}"
        lines.append(f"| `{name}` | {numbers} | {one['part']} | {f'`{operation}`' if operation else ''} |")
    return "\n".join(lines)


def _traced(found: dict[str, Any]) -> str:
    told = f"{found['traced_milliseconds']:.2f} ms traced, {found['idle']:.1%} of it idle"
    return f"{told}; {found['guessed']:.1%} of device time put into a part by the kernel's name alone"
