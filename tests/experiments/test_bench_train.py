"""bench.py train and curves: what both sides are given, what is made of their numbers, and the whole on few tokens."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from stablelora_jax import InputError
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.training.flops import flops_per_token
from stablelora_jax.utils.errors import RunError
from tests.conftest import ROOT

KEYS = {"tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes", "compile_seconds"}
BLOCKED = ("transformers", "datasets", "orbax", "tensorboardX", "torch", "peft", "safetensors", "gguf", "matplotlib")
TUNIX_PYTHON = os.environ.get("STABLELORA_TUNIX_PYTHON")  # an interpreter that has google-tunix, if not this one


@pytest.fixture(autouse=True)
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")


def work(*flags):
    import argparse

    from bench import train as bench_train

    parser = argparse.ArgumentParser()
    bench_train.add_options(parser)
    return bench_train.work_of(parser.parse_args([str(flag) for flag in flags]))


def run(*flags, **environment):
    command = [sys.executable, ROOT / "experiments" / "bench.py", "train", "--json", *flags]
    env = {**os.environ, **environment}
    return subprocess.run([str(x) for x in command], env=env, capture_output=True, text=True, timeout=600)


def test_shapes_are_those_of_the_models():
    """Parameters as their authors count them, in millions."""
    from bench.shapes import SHAPES

    counts = {"llama-15m": 15.2, "smollm2-135m": 134.5, "qwen2-0.5b": 494.0, "qwen2-1.5b": 1543.7}
    counts |= {"llama3.2-1b": 1235.8, "llama3.2-3b": 3212.7, "llama3.1-8b": 8030.3}
    counts |= {"qwen3-0.6b": 596.0, "qwen3-1.7b": 1720.6, "qwen3-4b": 4022.5, "qwen3-8b": 8190.7}
    assert set(counts) == set(SHAPES)
    for name, millions in counts.items():
        config = decoder_config(SHAPES[name], name)
        heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        small = 2 * config.hidden_size + heads * config.qkv_bias + 2 * config.head_dim * config.qk_norm
        again = config.vocab_size * config.hidden_size * (not config.tie_word_embeddings)
        total = flops_per_token(config, 0, 0) / 4 + config.num_hidden_layers * small + config.hidden_size + again
        assert round(total / 1e6, 1) == millions, name


def test_what_is_learnt_is_the_end_of_each_text():
    from bench.work import arrays, from_json, to_json

    made = work("--batch", 2, "--length", 10, "--documents", 2, "--loss-fraction", 0.4)
    found = arrays(made)
    assert from_json(to_json(made)) == made and made.tokens_per_step == 20 and made.mean_attended_length == 5
    np.testing.assert_array_equal(found["positions"], [[0, 1, 2, 3, 4] * 2] * 2)
    np.testing.assert_array_equal(found["segment_ids"], [[1] * 5 + [2] * 5] * 2)
    np.testing.assert_array_equal(found["loss_mask"], [[0, 0, 0, 1, 1] * 2] * 2)
    assert found["tokens"].dtype == np.int32 and len(np.unique(found["tokens"])) == 20
    whole = arrays(work("--batch", 1, "--length", 4))
    np.testing.assert_array_equal(whole["loss_mask"], [[0, 1, 1, 1]])  # nothing predicts the first


def test_ratios_are_of_the_rounds_and_of_the_fastest_peer():
    from bench import report as bench_report

    made = work("--batch", 1, "--length", 32)
    about = {"device": "NVIDIA H200", "lora_parameters": 7, "versions": {}, "compile_seconds": 3.0}
    memory = {"peak_memory_bytes": 100, "steps_bytes": 80, "before_bytes": 30}
    found = {
        "stablelora_jax": {**about, **memory, "round_seconds": [1.0, 2.0, 4.0]},
        "peft eager": {**about, "peak_memory_bytes": 300, "round_seconds": [9.0, 9.0, 9.0]},
        "peft compile": {**about, **memory, "steps_bytes": 130, "round_seconds": [3.0, 4.0, 4.0]},
    }
    sides = {name: bench_report.summary(side, made, 1e9) for name, side in found.items()}
    whole = bench_report.result(sides, made)
    assert whole["peer"]["name"] == "peft compile" and set(whole["peers"]) == {"peft eager", "peft compile"}
    assert whole["ratio"] == 2.0 and whole["ratio_rounds"] == [3.0, 2.0, 1.0] and whole["memory_ratio"] == 1
    assert whole["memory_ratio_beyond_imports"] == 0.5 and whole["ratio_quartiles"] == [1.5, 2.5]
    assert whole["step_seconds"] == 2.0 and whole["tokens_per_second"] == 16.0
    assert whole["mfu"] == pytest.approx(16 * whole["model_flops_per_token"] / 1e9)
    assert bench_report.summary(found["peft eager"], made, None)["mfu"] is None
    four = {**found["stablelora_jax"], "devices": 4}
    assert bench_report.summary(four, made, 1e9)["mfu"] == pytest.approx(whole["mfu"] / 4)
    whole_cpu = bench_report.summary({**four, "device": "cpu"}, made, 1e9)  # its devices are parts of it
    assert whole_cpu["mfu"] == pytest.approx(whole["mfu"]) and whole_cpu["devices"] == 4
    text = bench_report.table(sides, whole)
    assert "2.00 times the speed of peft compile (quartiles 1.50 to 2.50), 1.00 of its" in text
    assert whole["peers"]["peft eager"]["ratio"] == 4.5 and "4.50 times the speed of peft eager" in text
    sides["stablelora_jax"] |= {"peak_memory_bytes": None, "steps_bytes": None}  # an allocator that keeps no count
    whole = bench_report.result(sides, made)
    last = bench_report.table(sides, whole).splitlines()[-1]
    assert whole["memory_ratio"] is None and "times the speed of peft compile" in last


def test_versions_that_are_not_ours_are_said_with_the_peer():
    from bench import report as bench_report

    sides = {
        "stablelora_jax": {"versions": {"jax": "1", "flax": "2"}},
        "tunix": {"versions": {"jax": "3", "flax": "2"}},
    }
    assert bench_report.format_versions(sides) == "jax 1, flax 2, tunix's jax 3"


def test_memory_forgets_what_was_before_the_steps():
    """In a process of its own: in that of the tests, what earlier ones held may be freed meanwhile."""
    code = """if True:
        import json, numpy
        from bench.side import host_memory, resident
        before = resident()
        held = numpy.ones(200_000_000, numpy.int8)
        del held
        memory = host_memory(before)
        now = numpy.ones(50_000_000, numpy.int8)
        print(json.dumps(memory()))
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT / "experiments")}
    found = json.loads(subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, check=True).stdout)
    if found["before_bytes"] is None:
        pytest.skip("the system does not say")
    assert found["peak_memory_bytes"] >= found["before_bytes"] + 200_000_000 - 2**24
    assert found["steps_bytes"] is None or 45e6 < found["steps_bytes"] - found["before_bytes"] < 100e6


@pytest.mark.long
def test_a_line_of_json_needs_no_data_sets_and_no_torch(tmp_path, monkeypatch):
    """From a process and its worker in which the optional packages cannot be imported."""
    from bench import turns as bench_turns

    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {BLOCKED}: raise ModuleNotFoundError(f'{{name}} is blocked')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    flags = "--batch 1 --length 32 --steps 1 --rounds 2 --peak-flops 1e12 --optimizer stable_lora".split()
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run(*flags, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1 and KEYS <= set(found) and "peer" not in found
    assert all(found[key] > 0 for key in KEYS) and found["shape"] == "llama-15m" and found["optimizer"] == "stable_lora"
    assert found["tokens_per_second"] == pytest.approx(32 / found["step_seconds"])
    assert "| stablelora_jax |" in done.stderr
    monkeypatch.setenv("PYTHONPATH", paths)
    with pytest.raises(InputError, match="^peft eager: torch is blocked$"):
        bench_turns.measure_sides(["peft eager"], work(), 1, 1, False)


@pytest.mark.long
def test_a_cpu_is_cut_into_its_cores_where_rows_divide_so():
    """Unless a number is given."""
    from bench.work import to_json

    forced = "--xla_force_host_platform_device_count=3"  # by hand: jax then takes no other number
    rows = [("--batch 6", 4, "", 2), ("--batch 3", 2, "", 1), ("--batch 6 --devices 3", 2, "", 3)]
    for flags, cores, given, parts in [*rows, ("--batch 8", 4, forced, 1), ("--batch 6", 6, forced, 3)]:
        code = "import os, sys; from bench import ours, work\n"
        code += "os.sched_getaffinity = lambda _: range(int(sys.argv[1]))\n"
        code += "print(len(ours.local_devices(work.from_json(sys.argv[2]))))"
        env = {**os.environ, "XLA_FLAGS": given, "PYTHONPATH": str(ROOT / "experiments")}
        command = [sys.executable, "-c", code, str(cores), to_json(work(*flags.split()))]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.stdout == f"{parts}\n", done.stderr


def test_more_devices_than_there_are_is_one_line():
    forced = "--xla_force_host_platform_device_count=2"
    done = run("--batch", 4, "--devices", 4, XLA_FLAGS=forced)
    assert done.returncode == 2 and not done.stdout
    said = "error: stablelora_jax: --devices 4: only 2 available"
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.long
def test_the_peer_does_the_same_work():
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    flags = "--batch 2 --length 32 --documents 2 --loss-fraction 0.25 --steps 1 --rounds 1 --peer peft".split()
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert KEYS <= set(found["peer"]) and found["peer"]["name"] == "peft eager" and found["ratio"] > 0
    assert found["lora_parameters"] == found["peer"]["lora_parameters"] == 6 * 8 * (4 * 2 * 288 + 3 * (288 + 768))
    assert found["ratio_rounds"] == [
        b / a for a, b in zip(found["round_seconds"], found["peer"]["round_seconds"], strict=True)
    ]
    assert found["mfu"] is None and found["memory_ratio"] > 0


def test_tunix_does_the_same_work():
    """In an environment of its own, or in this one."""
    if not TUNIX_PYTHON:
        pytest.importorskip("tunix")
        pytest.importorskip("qwix")
    flags = "--batch 2 --length 32 --documents 2 --loss-fraction 0.25 --steps 1 --rounds 1 --peer tunix".split()
    done = run(*flags, *(["--peer-python", TUNIX_PYTHON] if TUNIX_PYTHON else []))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert KEYS <= set(found["peer"]) and found["peer"]["name"] == "tunix" and found["ratio"] > 0
    assert found["lora_parameters"] == found["peer"]["lora_parameters"] == 6 * 8 * (4 * 2 * 288 + 3 * (288 + 768))
    losses = dict(re.findall(r"round 1 of 1: (\w+): .* loss ([0-9.]+)", done.stderr))
    assert set(losses) == {"stablelora_jax", "tunix"}
    assert all(abs(float(loss) - np.log(32000)) < 0.3 for loss in losses.values())


def test_tunix_says_what_it_cannot_do():
    if not TUNIX_PYTHON:
        pytest.importorskip("tunix")
        pytest.importorskip("qwix")
    from bench import turns as bench_turns

    with pytest.raises(InputError, match="^tunix: no target 'lm_head' in tunix's model: choose from q_proj, k_proj"):
        pythons = {"tunix": TUNIX_PYTHON} if TUNIX_PYTHON else {}
        bench_turns.measure_sides(["tunix"], work("--target", "q_proj,lm_head"), 1, 1, False, pythons)


def test_peers_have_names_and_interpreters(monkeypatch):
    import argparse

    from bench import peers as bench_peers

    parser = argparse.ArgumentParser()
    bench_peers.add_peer_options(parser.add_argument)
    monkeypatch.setattr(bench_peers, "on_gpu", lambda: True)

    def asked(flags):
        return bench_peers.parse_peers(parser.parse_args(flags.split()))

    here = sys.executable
    assert asked("") == (["stablelora_jax"], {})
    names = ["stablelora_jax", "peft eager", "peft compile", "tunix"]
    assert asked(f"--peer peft,tunix --peer-python tunix={here}") == (names, {"tunix": here})
    assert asked(f"--peer tunix,peft --peer-modes eager --peer-python {here}") == (
        ["stablelora_jax", "tunix", "peft eager"],
        {"tunix": here, "peft": here},
    )


@pytest.mark.parametrize(
    "peer, lacks", [("tunix", r"tunix: google-tunix is not installed \(No"), ("peft eager", "peft eager: No")]
)
def test_an_environment_without_the_peer_is_one_line(tmp_path, monkeypatch, peer, lacks):
    """Not even NumPy is there."""
    from bench import turns as bench_turns

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    pythons = {peer.split()[0]: str(tmp_path / "bare" / "bin" / "python")}
    with pytest.raises(InputError, match=f"^{lacks} module named '(jax|torch)'"):
        bench_turns.measure_sides([peer], work("--batch", 1, "--length", 32), 1, 1, False, pythons)


@pytest.mark.parametrize(
    "text, said", [("", "cannot be run"), ("#!/bin/sh\necho hello\n", "is not Python: it printed hello")]
)
def test_an_interpreter_that_is_none_is_one_line(tmp_path, text, said):
    from bench import turns as bench_turns

    (tmp_path / "python").write_text(text)
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(InputError, match=f"^tunix: .*{said}"):
        bench_turns.measure_sides(["tunix"], work(), 1, 1, False, {"tunix": str(tmp_path / "python")})


def test_a_side_that_cannot_says_so():
    from bench import turns as bench_turns

    with pytest.raises(InputError, match="stablelora_jax: .*nope"):
        bench_turns.measure_sides(
            ["stablelora_jax"], work("--target", "nope", "--batch", 1, "--length", 32), 1, 1, False
        )


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--peer-modes compile", "--peer-modes needs --peer$"),
        ("--peer peft --peer-modes eager,eager", "eager, compile, or both, comma-separated, not eager,eager"),
    ],
)
def test_modes_of_the_peer_are_checked_before_anything_runs(flags, said):
    with pytest.raises(InputError, match=said):
        work(*flags.split())


@pytest.mark.parametrize("kind, needed", [("splash", "tpu"), ("cudnn", "gpu")])
def test_an_attention_of_another_backend_is_one_line(kind, needed):
    done = run("--attention", kind, "--dtype", "bfloat16", "--batch", 1)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    said = f"error: stablelora_jax: {kind} attention needs a {needed}, and here is a cpu: choose auto"
    assert done.stderr.splitlines()[-1] == said


def test_a_side_that_has_ended_says_so():
    from bench.turns import Worker, request

    ended = subprocess.Popen([sys.executable, "-c", "exit(9)"], stdin=-1, stdout=-1, text=True)
    ended.wait()
    with pytest.raises(RunError, match="peft eager ended with exit code 9"):
        request(Worker("peft eager", ended, {}), "5")
    ended.communicate()


def test_curves_change_one_number_at_a_time(monkeypatch, tmp_path, capsys):
    from bench import curves as bench_curves
    from bench import front as bench

    seen = []

    def measured(names, made, steps, rounds, apart):
        seen.append(made)
        cost = made.batch * made.length * made.config["num_hidden_layers"]
        memory = {"peak_memory_bytes": cost, "steps_bytes": cost + 5, "before_bytes": 5}
        return {names[0]: {"round_seconds": [cost] * rounds, "compile_seconds": 2.0, **memory}}

    monkeypatch.setattr(bench_curves, "measure_sides", measured)
    monkeypatch.setattr(sys, "argv", ["bench.py", "curves", "--output", str(tmp_path / "out"), "--batch", "2"])
    assert bench.main() == 0
    points = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert [p["value"] for p in points if p["axis"] == "layers"] == [3, 6, 12, 24]
    assert [p["value"] for p in points if p["axis"] == "batch"] == [1, 2, 4, 8]
    assert [p["step"] for p in points if p["axis"] == "length"] == [2 * T * 6 for T in (64, 128, 256, 512)]
    assert {made.rank for made in seen} == {4, 8, 16, 32} and len(seen) == 16
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "curves.md").read_text() == capsys.readouterr().out
    for axes in bench_curves.figure([bench_curves.Point(**p) for p in points], "").axes:
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        xs, ys = axes.lines[0].get_data()
        assert x0 == y0 == 0 and max(xs) < x1 and max(ys) < y1 and len(xs) == 4
