"""Whatever is wrong with a command or its surroundings: one line that names it, its exit code, and nothing lost.

Exit code 2 is for what a person gave, 1 for surroundings that break a run under way. Where the disk is as it was
before, byte for byte, the good command does what it would have done; where it is not, the test removes the cause as
the message says, and the good command ends with the log and the adapter of a run that nobody disturbed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stablelora_jax.runs.directory import lock
from stablelora_jax.training import checkpoint
from tests.conftest import ROOT
from tests.runs import bad_runs
from tests.runs.bad_runs import (
    CLOSED,
    FULL,
    GOOD,
    half,
    in_place_of,
    largest,
    lost,
    modes,
    one_bit,
    remove,
    same,
    snapshot,
    train,
    write_rows,
)
from tests.runs.damage import tensors, value

NEWEST = "run/checkpoints/3"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, data, an adapter, a run that was stopped after step 3, and the same run finished; it is only copied."""
    place, before = tmp_path_factory.mktemp("world"), os.getcwd()
    os.chdir(place)
    try:
        bad_runs.make_world(place)
        bad_runs.stopped_then_finished(place)
        yield place
    finally:
        os.chdir(before)


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A copy of the world, where we are."""
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def fails(capfd):
    """Run the command, which must fail in one line."""

    def run(code, message, *words):
        capfd.readouterr()
        found = train(*GOOD, *words)
        out, err = capfd.readouterr()
        one_line(found, out, err, code, message)

    return run


def one_line(found, out, err, code, message):
    assert found == code, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert re.search(message, err), err
    assert "Traceback" not in out


MISTAKES = [  # what is given on the command line -> what is said
    ("lora.rnk=4", r"lora.rnk is not a key \(did you mean lora.rank\?\)"),
    ("parallel.fsdp=2", "parallel.fsdp is not a key of parallel.name=pmap, but of mesh"),
    ("steps=many", "steps wants int, got 'many'"),
    ("steps=2.5", "steps wants int, got 2.5"),
    ("steps=0", "steps must be at least 1 and at most 2147483647, not 0"),
    ("steps=[1,", "not valid YAML in line 1"),
    ("task=3", "task holds keys .*, not 3"),
    ("batch_size", "an override is KEY=VALUE, such as seed=3"),
    ("model.untie=maybe", "model.untie wants bool"),
    ("model.dtype=float8", r"model.dtype wants float32 \| bfloat16"),
    ("optimizer.name=sgd", "optimizer.name wants stable_lora"),
    ("optimizer.shrink_ratio=1.5", r"shrink_ratio must be in \[0, 1\)"),
    ("optimizer.learning_rate=.nan", "optimizer.learning_rate wants a finite float, got nan"),
    ("max_grad_norm=.inf", r"max_grad_norm wants a finite float \| null, got inf"),
    ("epochs=.nan", r"epochs wants a finite float \| null, got nan"),
    ("lora.alpha=.inf", "lora.alpha wants a finite float, got inf"),
    ("lora.dropout=1", r"dropout must be in \[0, 1\)"),
    ("lora.rank=0", "rank must be a whole number of at least 1"),
    ("seed=-1", "seed must be at least 0 and below 4294967296, not -1"),
    ("seed=18446744073709551616", "seed must be at least 0 and below 4294967296, not 18446744073709551616"),
    ("schedule.warmup_steps=99", r"schedule.warmup_steps must be in \[0, 6\], not 99"),
    ("epochs=1 schedule.warmup_steps=99", r"schedule.warmup_steps must be in \[0, 2\], not 99"),
    ("epochs=1e300", "epochs 1e[+]300 are 2e[+]300 steps, more than 2147483647: name fewer"),
    ("epochs=1e20", "more than 2147483647: name fewer"),
    ("steps=2147483648", "steps must be at least 1 and at most 2147483647, not 2147483648"),
    ("batch_size=2097152", "batch_size must be at least 1 and at most 1048576, not"),
    ("max_length=33554432", "max_length must be at least 1 and at most 16777216, not"),
    ("lora.stacked=[]", "lora.stacked must hold layers"),
    ("lora.rank=9999999999999999999999", "rank must be below 2[*][*]63"),
    ("lora.rank=1000000000000", "a pair of rank 1000000000000 beside a kernel of .* fits no memory"),
    ("lora.target_modules='(([a-z_.0-9]+)+)+!'", "matches no module"),
    (
        "distributed={coordinator:\xa0'x.invalid:1',processes:\xa01,process:\xa00}",
        "the host of 'x.invalid:1' is not found",
    ),
    ("evaluate=false evaluate_every=2", "evaluate_every needs evaluate: true"),
    ("select=best", "select: best needs evaluate_every"),
    ("patience=2", "patience needs evaluate_every"),
    ("metric=acc", "metric acc needs multiple choice"),
    ("trackers=[paper]", r"trackers\[0\] wants tensorboard"),
    ("batch_size=12", "12 rows does not divide over 8 devices: batch_size must be a multiple of 8"),
    ("gradient_accumulation_steps=3", "batch_size 8 does not divide into 3 micro-batches"),
    ("gradient_accumulation_steps=2", "over 8 devices in 2 micro-batches: batch_size must be a multiple of 16"),
    ("parallel.name=mesh parallel.fsdp=3", r"a mesh of 2 x 3 x 1 \(data, fsdp, tensor\) is not 8 devices"),
    ("parallel.name=mesh parallel.tensor=0", "a mesh needs positive sizes"),
    ("distributed.process=0", "needs all of coordinator, processes and process, or none"),
    ("distributed={coordinator:\xa0here,processes:\xa02,process:\xa00}", "coordinator must be host:port, not here"),
    ("distributed={coordinator:\xa0'h:9',processes:\xa02,process:\xa02}", r"process must be in \[0, 1\], not 2"),
    ("lora.target_modules=[q_prj]", "target_modules 'q_prj' matches no module; did you mean q_proj"),
    ("lora.layers_to_transform=[7]", "there is no layer 7 in the model"),
    ("lora.modules_to_save=[nothing]", "modules_to_save 'nothing' matches no module"),
    ("freeze=[nothing]", "freeze: 'nothing' matches no module; modules here end in"),
    ("freeze=[lora_a,lora_b]", "lora_a, lora_b leave nothing to train: name less"),
    ("init_from=nowhere", "nowhere is neither a run directory .* nor an adapter"),
    ("init_from=run", "run has no adapter yet: the run has not ended; its command continues it"),
    ("init_from=adapter lora.rank=4", "adapter does not fit this run: lora.rank is 2 in adapter and 4 here"),
    ("max_length=4096", "max_length 4096 is more than the 2048 of base"),
    ("max_length=1", "does not fit into max_length=1 with its prompt"),
    ("data.chat_template=true", "no chat template: set data.chat_template to false"),
    ("data.cache=base/config.json", "the token cache base/config.json/.* cannot be used: Not a directory"),
    ("model.path=nowhere", "nowhere is no model directory, and the hub gave no config.json"),
    ("model.path=data", "data/config.json cannot be read"),
    ("task.path=nowhere", "nowhere does not exist; a directory with train.jsonl is needed"),
    ("task.kind=choice", "data/train.jsonl: row 1: there is no column 'choices'; the columns are prompt, completion"),
    ("task.fields={x:\xa0y}", "task.fields.x is not read for kind completion"),
    ("--config nowhere.yaml", "nowhere.yaml"),
    ("--config data", "data: Is a directory"),
    ("--config base/model.safetensors", "base/model.safetensors: .*name a YAML file in UTF-8 that can be read"),
    ("output=data", "data exists and is no run directory: choose another output="),
    ("output=data/train.jsonl/r", "cannot write to data/train.jsonl/r: .* is no directory that can be written to"),
    (f"output={'x' * 300}", "File name too long: choose another output="),
    ('output="a\\0b"', "embedded null byte: choose another output="),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=[words[:40] for words, _ in MISTAKES])
def test_mistakes(place, fails, words, message):
    before = snapshot(place)
    fails(2, message, "output=new", *(word.replace("\xa0", " ") for word in words.split(" ")))
    assert snapshot(place) == before


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_trackers_that_are_not_installed(place, fails, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    before = snapshot(place)
    fails(2, f"trackers: {name} is not installed: pip install {name}, or leave it out", f"trackers=[{name}]")
    assert snapshot(place) == before


CHANGED = [  # of the run's command -> what is said
    ("lora.rank=3", r"another configuration \(lora.rank is 2 there and 3 here\): choose another output="),
    ("lora.alpha=8", r"lora.alpha is 16.0 there and 8.0 here\): choose another output="),
    ("optimizer.name=adamw", "optimizer.name is stable_lora there and adamw here"),
    ("steps=8", r"steps is 6 there and 8 here\): .* or go on with accept_changes=true"),
    ("lora.rank=3 accept_changes=true", "checkpoints/3 does not fit: .* go on with what it was saved with"),
    ("optimizer.name=adamw accept_changes=true", "checkpoints/3 does not fit: opt_state"),
    ("lora.target_modules=[k_proj] accept_changes=true", "checkpoints/3 does not fit: .*k_proj.* is absent there"),
    ("steps=2 accept_changes=true", "run has done 3 steps, more than steps=2: raise steps"),
]


@pytest.mark.parametrize("words, message", CHANGED)
def test_another_configuration_of_a_run_changes_nothing(place, fails, words, message):
    before = snapshot(place)
    fails(2, message, *words.split())
    assert snapshot(place) == before


INPUTS = {  # what is done to base and data -> what is said
    "tokenizer gone": (remove("base/tokenizer.json", "base/tokenizer_config.json"), "base has no tokenizer: put"),
    "tokenizer empty": (in_place_of("base/tokenizer.json", ""), "base: its tokenizer cannot be read"),
    "base's config gone": (remove("base/config.json"), "base/config.json cannot be read"),
    "base's config damaged": (in_place_of("base/config.json", "{"), "base/config.json is not .*JSON|config.json"),
    "weights gone": (remove("base/model.safetensors"), "base holds neither model.safetensors nor"),
    "weights cut": (half(largest("base")), "base/model.safetensors is not a readable safetensors file"),
    "data gone": (remove("data/train.jsonl"), "data has neither train.jsonl nor"),
    "data empty": (in_place_of("data/train.jsonl", ""), "data/train.jsonl has no rows"),
    "data no JSON": (in_place_of("data/train.jsonl", "hello\n"), "data/train.jsonl: line 1 is not JSON"),
    "data of another kind": (in_place_of("data/train.jsonl", "[]\n"), "data/train.jsonl has no rows"),
    "data a directory": (in_place_of("data/train.jsonl", None), "data has neither train.jsonl nor"),
    "validation gone": (remove("data/validation.jsonl"), "data has neither validation.jsonl nor"),
    "weights changed": (
        lambda place: tensors("model.safetensors", value(0.5, "model.layers.0.self_attn.q_proj.weight"))(
            place / "base"
        ),
        "checkpoints/3 is of another run: base.model.layers.self_attn.q_proj.kernel is .* go on with what it was saved",
    ),
    "data changed": (
        lambda place: write_rows(place / "data" / "train.jsonl", range(1, 17)),
        "checkpoints/3 is of another run: data.digest is .* go on with what it was saved with",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_base_and_data(place, fails, name):
    spoil, message = INPUTS[name]
    spoil(place)
    before = snapshot(place)
    fails(2, message)
    assert snapshot(place) == before


DAMAGES = {  # of a run directory -> what is said, and the way out of it
    "data cut": (
        half(largest(f"{NEWEST}/state/d")),
        "checkpoints/3 cannot be read .*: remove .*3 to go on from step 2",
    ),
    "data's bit": (one_bit(largest(f"{NEWEST}/state/d")), "checkpoints/3 cannot be read .*: remove .*3 to go on"),
    "data gone": (
        lambda place: largest(f"{NEWEST}/state/d")(place).unlink(),
        "3 cannot be read .*: remove .*3 to go on",
    ),
    "manifest gone": (remove(f"{NEWEST}/state/manifest.ocdbt"), "3 cannot be read .*: remove .*3 to go on"),
    "metadata gone": (remove(f"{NEWEST}/state/_METADATA"), "3 cannot be read .*: remove .*3 to go on from step 2"),
    "metadata cut": (
        half(lambda place: place / NEWEST / "state" / "_METADATA"),
        "3 cannot be read .*: remove .*3 to go",
    ),
    "state gone": (remove(f"{NEWEST}/state"), "3 cannot be read .*: remove .*3 to go on from step 2"),
    "record gone": (remove(f"{NEWEST}/about/metadata"), r"3 cannot be read \(about/metadata is missing\): remove"),
    "record garbage": (in_place_of(f"{NEWEST}/about/metadata", "{no"), "about/metadata is no JSON of ours.*: remove"),
    "record's bit": (one_bit(lambda place: place / NEWEST / "about" / "metadata"), "about/metadata is n.*: remove"),
    "empty step": (in_place_of(NEWEST, None), r"3 cannot be read \(about/metadata is missing\): remove"),
    "checkpoints a file": (
        in_place_of("run/checkpoints", "x"),
        "checkpoints cannot be read .Not a directory.: make it readable, or save elsewhere",
    ),
    "config garbage": (
        in_place_of("run/config.yaml", "{no"),
        "run/config.yaml: not valid YAML .*; put back what it was",
    ),
    "config binary": (in_place_of("run/config.yaml", b"\xff\x00"), "run/config.yaml: .*; put back what it was"),
    "config empty": (in_place_of("run/config.yaml", ""), "run holds a run with another configuration"),
    "config gone": (remove("run/config.yaml"), "run exists and is no run directory: choose another output="),
    "summary garbage": (in_place_of("run/summary.json", "{no"), "summary.json is not readable JSON: .*: remove it"),
}
MENDED = {  # the way out, where it is not to put back what was there
    "data cut": remove(NEWEST),
    "empty step": remove(NEWEST),
    "checkpoints a file": remove("run/checkpoints"),
    "summary garbage": remove("run/summary.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_run_directories(place, world, fails, name):
    spoil, message = DAMAGES[name]
    spoil(place)
    before = snapshot(place)
    fails(2, message)
    assert snapshot(place) == before
    if name in MENDED:
        MENDED[name](place)
        goes_on(place, world)


UNDER_WAY = {  # what stands in the way of a run -> how it ends, and what is said; before the work where that can be
    "log a directory": ("run/metrics.jsonl", None, 2, "run/metrics.jsonl was not made by a run: move it"),
    "log a user's": ("run/metrics.jsonl", '{"step": 1, "loss": 3}\n', 2, "run/metrics.jsonl was not made by a run"),
    "tensorboard a file": ("run/tensorboard", "x", 1, "cannot write run/tensorboard/.*; once that is mended"),
    "adapter a file": ("run/adapter", "x", 2, "run/adapter was not made by a run: move it"),
    "adapter a user's": ("run/adapter", None, 2, "run/adapter was not made by a run: move it"),
    "picture a directory": ("run/loss.png", None, 2, "run/loss.png was not made by a run: move it"),
    "picture a user's": ("run/norms.png", "x", 2, "run/norms.png was not made by a run: move it"),
    "summary a directory": ("run/summary.json", None, 2, "run/summary.json was not made by a run: move it"),
    "lock a user's": ("run/.lock", "mine", 2, "run/.lock is not of a run: move it"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", UNDER_WAY)
def test_what_stands_in_the_way_of_a_run(place, world, fails, name):
    rel, content, code, message = UNDER_WAY[name]
    kept = snapshot(place)
    in_place_of(rel, content)(place)
    before = snapshot(place)
    fails(code, message)
    assert lost(before, snapshot(place)) == [] and not list(Path("run").rglob("*partial*"))
    remove(rel)(place)
    for path in (path for path in kept if path.startswith(rel)):
        (place / path).mkdir() if kept[path] is None else (place / path).write_bytes(kept[path])
    goes_on(place, world)


@pytest.mark.long
@pytest.mark.parametrize("what", ["run/checkpoints", "run"])
def test_directories_that_are_removed_while_the_run_goes_on(place, world, fails, what, monkeypatch):
    saving = checkpoint.save

    def save(manager, step, *rest):
        saving(manager, step, *rest)
        if step == 4:
            checkpoint.wait(manager)
            shutil.rmtree(what)

    monkeypatch.setattr(checkpoint, "save", save)
    fails(1, f"cannot write .*{what}.*(is gone; put it back or begin anew|No such file or directory)")
    monkeypatch.setattr(checkpoint, "save", saving)
    goes_on(place, world)


def test_numbers_that_are_not_finite(place, fails):
    fails(1, "not finite in 2 steps in a row, 1 to 2; .* saved in checkpoint 2. .* smaller learning_rate", "output=new",
          "optimizer.learning_rate=1e30", "max_consecutive_errors=2", "evaluate=false")  # fmt: skip
    assert checkpoint.steps("new/checkpoints") == [2] and not Path("new/adapter").exists()


def test_too_little_memory(place, fails):
    before = snapshot(place)
    fails(1, r"too little memory \(RESOURCE_EXHAUSTED.*a smaller batch_size", "output=new", "lora.rank=10000000000")
    assert snapshot(place) == before


def test_a_run_directory_that_another_process_writes(place, fails):
    with lock(place / "run"):
        before = snapshot(place)
        fails(2, f"run is being written by process {os.getpid()} on .*: wait for it or choose another output=")
        assert snapshot(place) == before


@pytest.mark.long
def test_what_is_no_error(place, world):
    """A cut line in the log, an adapter that was removed, a checkpoint half written: the same command mends them."""
    log = Path("run/metrics.jsonl")
    log.write_bytes(log.read_bytes() + b'{"step": 4, "lo')
    Path("run/checkpoints/4.orbax-checkpoint-tmp").mkdir()
    Path("run/.config.yaml.partial").write_text("model")
    goes_on(place, world)
    shutil.rmtree("run/adapter")
    goes_on(place, world)


def goes_on(place, world):
    assert train(*GOOD) == 0
    assert same(place / "run", world / "finished")


# what needs a process of its own


def process(*command, **changes):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def script(*words):
    return [sys.executable, str(ROOT / "experiments" / "train.py"), "--config", os.devnull, *GOOD, *words]


def ends(world, tmp_path_factory, kind, *within):
    """By name how the runs of ``bad_runs.py`` have ended, in a process that has other rights."""
    if subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip(f"{within[0]} is refused here")
    scratch = tmp_path_factory.mktemp(kind)
    done = process(*within, sys.executable, "-m", "tests.runs.bad_runs", kind, str(world), str(scratch))
    assert done.returncode == 0, done.stderr
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def closed(world, tmp_path_factory):
    """Even root obeys the modes of files here."""
    within = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else ["env"]
    if not shutil.which(within[0]):
        pytest.skip("setpriv is not here")
    return ends(world, tmp_path_factory, "closed", *within)


@pytest.fixture(scope="module")
def mounted(world, tmp_path_factory):
    """Small disks can be mounted here."""
    if not shutil.which("unshare"):
        pytest.skip("unshare is not here")
    within = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none /mnt && umount /mnt && exec "$@"', "sh"]
    return ends(world, tmp_path_factory, "mounted", *within)


def check(found, code, message):
    one_line(found["first"][0], *found["first"][1:], code, message)
    assert found["lost"] == []
    assert found["second"][0] == 0 and found["same"], found["second"][2]


@pytest.mark.long
@pytest.mark.parametrize("name", CLOSED)
def test_without_permission(closed, name):
    check(closed[name], *CLOSED[name][1:])


@pytest.mark.long
@pytest.mark.parametrize("name", FULL)
def test_full_disks(mounted, name):
    check(mounted[name], *FULL[name][1:])


@pytest.mark.long
def test_a_new_run_on_a_full_disk(mounted):
    check(mounted["new"], 1, "cannot write to small/run: No space left on device")


@pytest.mark.long
def test_a_read_only_disk(mounted):
    check(mounted["read-only"], 2, "cannot write to run: .* is no directory that can be written to")


@pytest.mark.long
def test_a_whole_process_whose_checkpoints_cannot_be_written(place, world):
    """Its end, with that of all threads, included."""
    modes("run/checkpoints", 0o500)(place)
    within = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    if within and not shutil.which("setpriv"):
        pytest.skip("setpriv is not here")
    done = process(*within, *script())
    modes("run/checkpoints", 0o700)(place)
    one_line(done.returncode, done.stdout, done.stderr, 1, "cannot write checkpoint 4 in .*; step 3 is the newest")


@pytest.mark.long
def test_devices_that_are_not_there(place, world):
    before = snapshot(place)
    done = process(*script(), JAX_PLATFORMS="nonsense")
    one_line(done.returncode, done.stdout, done.stderr, 2, "jax finds no device of nonsense: .*see JAX_PLATFORMS")
    assert snapshot(place) == before


@pytest.mark.long
def test_a_terminal_that_is_gone_does_not_end_a_run(place, world):
    with open("/dev/full", "w") as full:
        done = subprocess.run(script(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert same(place / "run", world / "finished")
