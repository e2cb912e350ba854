"""Two processes over loopback are one run: the same losses, checkpoints and decisions."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from stablelora_jax import InputError, base_directory, load_peft, load_pretrained
from stablelora_jax.parallel import distributed, initialize
from stablelora_jax.training import checkpoint
from stablelora_jax.utils.fingerprint import fingerprint
from tests.conftest import ROOT
from tests.parallel.cases import HALF, batches, go, make, problem


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def start(*arguments):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment(), **pipes)


@pytest.fixture
def one_device():
    jax.config.update("jax_enable_x64", True)
    model, params, begun = problem(jnp.float64, 0.1)
    layout, step, placed = make("one device", model, params)
    yield params, begun, lambda state, given: go(step, layout, placed, state, given)
    jax.config.update("jax_enable_x64", False)


@pytest.mark.long
def test_steps_and_checkpoints(one_device, tmp_path):
    params, begun, run = one_device
    half, losses = run(begun, batches()[:HALF])
    checkpoint.save(tmp_path / "single", HALF, half)
    expected = np.concatenate([losses, run(half, batches()[HALF:])[1]])
    port = str(free_port())
    pair = [start("-m", "tests.parallel.two_processes", port, str(i), str(tmp_path)) for i in range(2)]
    said = [process.communicate(timeout=500) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    for out, _ in said:
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert [line["layout"] for line in lines] == ["pmap", "mesh 2 2 2", "mesh 1 1 8"]
        for line in lines:
            assert np.abs(np.array(line["losses"]) / expected - 1).max() < 1e-9, line["layout"]
            assert np.abs(np.array(line["on"]) / expected[HALF : HALF + 2] - 1).max() < 1e-9, line["layout"]
            assert line["base"] == fingerprint(params) and line["whole"] and line["agreed"] == [1, 5]
    for name in ("pmap", "mesh 2 2 2", "mesh 1 1 8"):
        state = checkpoint.restore(tmp_path / name, begun)
        assert np.abs(run(state, batches()[HALF : HALF + 2])[1] / expected[HALF : HALF + 2] - 1).max() < 1e-9, name


@pytest.mark.long
def test_a_signal_to_one_process_ends_both_at_the_same_step(tmp_path):
    port, out = free_port(), tmp_path / "r"
    words = ["experiments/train.py", "steps=100000", "batch_size=8", "task.train_limit=64", "evaluate=false"]
    words += ["lora.rank=2", f"output={out}", "parallel={name: mesh, fsdp: 4}", "distributed.processes=2"]
    pair = [start(*words, f"distributed.coordinator=localhost:{port}", f"distributed.process={i}") for i in range(2)]
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and all(process.poll() is None for process in pair)
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=100)[1] for process in pair]
    assert [process.returncode for process in pair] == [143, 143], said
    newest = checkpoint.latest(out / "checkpoints")
    assert all(f"SIGTERM after step {newest}, which is saved" in text for text in said)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(newest + 1)), "one process writes, each step once"


@pytest.mark.long
def test_an_adapted_embedding_that_is_split_over_processes_is_written_whole(tmp_path):
    port, out = free_port(), tmp_path / "r"
    words = ["experiments/train.py", "steps=1", "batch_size=8", "task.train_limit=64", "evaluate=false"]
    words += ["lora.rank=2", "lora.target_modules=[q_proj, embed_tokens]", "parallel={name: mesh, tensor: 2, fsdp: 4}"]
    words += [f"output={out}", "distributed.processes=2", "schedule.warmup_steps=0"]
    pair = [start(*words, f"distributed.coordinator=localhost:{port}", f"distributed.process={i}") for i in range(2)]
    said = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    _, params = load_pretrained(base_directory())
    _, spec = load_peft(out / "adapter", params)
    assert set(spec.target_modules) == {"embed_tokens", "q_proj"}
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    own = next(value for name, value in stored.items() if name.endswith("embed_tokens.base_layer.weight"))
    np.testing.assert_array_equal(own, params["model"]["embed_tokens"]["embedding"])


@pytest.mark.parametrize(
    "given,message",
    [
        (("host:1", None, 0), "needs all of coordinator, processes and process"),
        (("host", 2, 0), "must be host:port, not host"),
        (("host:1", 2, 2), r"process must be in \[0, 1\], not 2"),
        (("no.such.host.invalid:1", 2, 0), "the host of 'no.such.host.invalid:1' is not found"),
        (("localhost:0", 2, 0), "must be host:port"),
        (("localhost:99999", 2, 0), "must be host:port"),
        (("x" * 300 + ":1", 2, 0), "is not found"),
        (("a\0b:1", 2, 0), "is not found"),
        ((None, None, None), "did not find each other"),
    ],
)
def test_what_cannot_be_joined(given, message, monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", 0.0)
    with pytest.raises(InputError, match=message):
        initialize(*given)
