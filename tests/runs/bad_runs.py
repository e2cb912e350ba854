"""A small world for bad runs: a base, data, an adapter, a stopped run, and the command that goes on with it."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import uuid
from contextlib import contextmanager
from pathlib import Path

import jax

from stablelora_jax import LoraSpec, init_adapters, save_peft, save_pretrained
from stablelora_jax.runs import loop
from stablelora_jax.runs import run as module
from tests.conftest import ROOT
from tests.helpers import tiny_decoder, trained
from tests.runs.kill_and_resume import records

GOOD = (
    "model.path=base task.name=jsonl task.path=data lora.rank=2 steps=6 batch_size=8 max_length=16 checkpoint_every=2 "
    "output=run"
).split()
SPEC = LoraSpec(rank=2)
STOPPED = 3  # the step after which the run of the world was stopped; checkpoints 2 and 3 are there


def make_world(place):
    """``base``, ``data``, ``adapter`` (which fits) and ``run`` in the directory ``place``."""
    model, params = tiny_decoder(bos_token_id=1, eos_token_id=(2,), num_hidden_layers=2)
    save_pretrained(place / "base", model, params)
    small_tokenizer().save_pretrained(place / "base")
    save_peft(place / "adapter", trained(init_adapters(jax.random.key(0), params, SPEC), SPEC), SPEC)
    (place / "data").mkdir()
    for split, count in (("train", 16), ("validation", 2)):
        write_rows(place / "data" / f"{split}.jsonl", range(count))


def write_rows(path, numbers):
    """A line of JSON for each number."""
    rows = ({"prompt": f"w{3 + i % 20} w{4 + i % 9}", "completion": f"w{5 + i % 7}"} for i in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(31)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2")


def stopped_then_finished(place):
    """Make ``run``, which was stopped, and ``finished`` of the world in ``place``, where we are."""
    with stopped_after(STOPPED):
        assert train(*GOOD) == 143
    shutil.copytree("run", "stopped")
    assert train(*GOOD) == 0
    os.rename("run", "finished")
    os.rename("stopped", "run")


def train(*words):
    """The exit code of ``experiments/train.py`` with these words, in this process and directory."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "experiments" / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before, sys.argv = sys.argv, ["train.py", "--config", os.devnull, *words]
    try:
        return script.main()
    finally:
        sys.argv = before


@contextmanager
def stopped_after(steps):
    """Inside, a run gets SIGTERM in time to end after so many steps."""
    begun, make, listen = [], loop.make_step, module.catch_signals

    def counted(job):
        step = make(job)
        return lambda state, number: (begun.append(number), step(state, number))[1]

    @contextmanager
    def catch_signals():
        yield lambda: signal.SIGTERM if len(begun) >= steps - 1 else 0  # the loop looks a step ahead

    loop.make_step, module.catch_signals = counted, catch_signals
    try:
        yield
    finally:
        loop.make_step, module.catch_signals = make, listen


def snapshot(place):
    """The bytes of every file, and None for every directory, by relative path; locks left out."""
    return {
        str(path.relative_to(place)): None if path.is_dir() else path.read_bytes()
        for path in sorted(Path(place).rglob("*"))
        if path.name != ".lock"
    }


def in_place_of(rel, content):
    """A file with this content, or for None a directory, whatever was there."""

    def spoil(place):
        remove(rel)(place)
        if content is None:
            (place / rel).mkdir()
        else:
            (place / rel).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def remove(*rels):
    def spoil(place):
        for rel in rels:
            path = place / rel
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    return spoil


def largest(rel):
    """The largest file below."""
    return lambda place: max((p for p in (place / rel).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def half(which):
    """Cut a file in the middle."""
    return lambda place: os.truncate(which(place), which(place).stat().st_size // 2)


def one_bit(which):
    """Flip a bit in the middle."""

    def spoil(place):
        raw = bytearray(which(place).read_bytes())
        raw[len(raw) // 2] ^= 4
        which(place).write_bytes(raw)

    return spoil


def modes(rel, mode, *, below=False):
    """Close a file or a directory, and perhaps all files below it."""

    def spoil(place):
        paths = [place / rel, *((place / rel).rglob("*") if below else ())]
        for path in [p for p in paths if not below or p.is_file()]:
            path.chmod(mode)

    return spoil


CLOSED = {  # name: (what is closed, code, what is said)
    "output in a closed directory": (modes("locked", 0o500), 2, "cannot write to locked/run"),
    "run directory closed": (modes("run", 0o000), 2, "cannot write to run: Permission denied: choose another output="),
    "run directory read-only": (modes("run", 0o500), 2, "cannot write to run: .* no directory that can be written to"),
    "checkpoint closed": (modes("run/checkpoints/3", 0o000), 2, "checkpoints/3 cannot be read .*make it readable"),
    "checkpoints closed": (
        modes("run/checkpoints", 0o000),
        2,
        "checkpoints cannot be read .Permission denied.: make it",
    ),
    "checkpoints read-only": (modes("run/checkpoints", 0o500), 1, "cannot write checkpoint 4 in .*Permission denied"),
    "checkpoint's files closed": (modes("run/checkpoints/3/state", 0o000, below=True), 2, "make it readable"),
    "metrics.jsonl closed": (modes("run/metrics.jsonl", 0o000), 1, "metrics.jsonl: Permission denied; once that is"),
    "metrics.jsonl read-only": (modes("run/metrics.jsonl", 0o400), 1, "metrics.jsonl: Permission denied; once that"),
    "config.yaml closed": (modes("run/config.yaml", 0o000), 2, "run/config.yaml.*Permission denied"),
    "base closed": (modes("base", 0o000, below=True), 2, "base/config.json cannot be read: .*Permission denied"),
    "weights closed": (modes("base/model.safetensors", 0o000), 2, "base/model.safetensors is not a readable"),
    "data closed": (modes("data/train.jsonl", 0o000), 2, "data/train.jsonl.*Permission denied"),
}
FULL = {  # name: pages that are free when the run goes on, or what fills the disk, code, what is said
    "nothing free": (0, 1, "No space left on device"),
    "1 page": (1, 1, "cannot write checkpoint 4 in .*No space left on device; step 3 is the newest complete one"),
    "8 pages": (8, 1, "cannot write checkpoint 4 in .*No space left on device; step 3 is the newest complete one"),
    "while the adapter is written": (
        "keep_adapter",
        1,
        "cannot write the adapter to .*No space left on device; step 6",
    ),
    "while the pictures are drawn": ("finish", 1, "cannot write run/loss.png: No space left on device; once"),
}


def main(kind, world, scratch):
    """Print, as JSON lines, how runs end that are ``closed`` or ``mounted``; see ``test_bad_runs.py``."""
    os.chdir(scratch)
    cases = {"closed": closed, "mounted": mounted}[kind]
    for name, found in cases(Path(world), Path(scratch)):
        print(json.dumps({"name": name, **found}), flush=True)


def closed(world, scratch):
    """Each of :data:`CLOSED`, opened again afterwards."""
    for name, (spoil, _, _) in CLOSED.items():
        place = fresh(world, scratch)
        (place / "locked").mkdir()
        before, was = snapshot(place), {p: p.stat().st_mode for p in [place, *place.rglob("*")]}
        spoil(place)
        first = captured(*GOOD, *(["output=locked/run"] if name.startswith("output") else []))
        for path, mode in sorted(was.items()):
            if path.exists():
                path.chmod(mode)
        yield name, {"first": first, **afterwards(world, place, before)}


def mounted(world, scratch):
    """Each of :data:`FULL`, a new run on a full disk, and a read-only one; with space afterwards."""
    place = fresh(world, scratch)
    disk(place / "small", "size=1m")
    fill(place / "small", 0)
    first = captured(*GOOD, "output=small/run")
    free(place / "small")
    shutil.rmtree("run")
    os.symlink("small/run", "run")
    yield "new", {"first": first, **afterwards(world, place, {})}
    place = fresh(world, scratch)
    disk(place / "run", "size=1m")
    shutil.copytree(world / "run", place / "run", dirs_exist_ok=True)
    before = snapshot(place)
    subprocess.run(["mount", "-o", "remount,ro", str(place / "run")], check=True)
    first = captured(*GOOD)
    subprocess.run(["mount", "-o", "remount,rw", str(place / "run")], check=True)
    yield "read-only", {"first": first, **afterwards(world, place, before)}
    for name, (when, _, _) in FULL.items():
        place = fresh(world, scratch)
        disk(place / "run", "size=1m")
        shutil.copytree(world / "run", place / "run", dirs_exist_ok=True)
        before = snapshot(place)
        if isinstance(when, int):
            fill(place / "run", when)
            first = captured(*GOOD)
        else:
            first = full_inside(when, place / "run")
        free(place / "run")
        yield name, {"first": first, **afterwards(world, place, before)}


def afterwards(world, place, before):
    """What is lost now that the cause is removed, and where anything has changed, how the good command ends."""
    after = snapshot(place)
    if after == before:
        return {"lost": [], "second": [0, "", ""], "same": True}
    return {"lost": lost(before, after), "second": captured(*GOOD), "same": same(place / "run", world / "finished")}


def lost(before, after):
    """What was there and is gone or changed, but for a log that goes on and a checkpoint that newer ones replace."""
    steps = {int(n.split("/")[2]) for n in after if n.startswith("run/checkpoints/") and n.endswith("/about/metadata")}

    def replaced(name):
        if name == "run/metrics.jsonl":
            return (after.get(name) or b"").startswith(before[name])
        step = name.split("/")[2] if name.startswith("run/checkpoints/") else ""
        return step.isdecimal() and name not in after and len([s for s in steps if s > int(step)]) > 0

    return [name for name in before if after.get(name, ...) != before[name] and not replaced(name)]


def full_inside(name, directory):
    """The command's end where the disk is full from the moment that a function of ``run.py`` is called."""
    before = getattr(module, name)

    def instead(*arguments):
        fill(directory, 0)
        return before(*arguments)

    setattr(module, name, instead)
    try:
        return captured(*GOOD)
    finally:
        setattr(module, name, before)


def fresh(world, scratch):
    """A new copy of the world, which is where we are from now on."""
    place = scratch / uuid.uuid4().hex
    shutil.copytree(world, place, symlinks=True)
    os.chdir(place)
    return place


def same(run, finished):
    """Whether two runs have the same log, but for the clock, and the same adapter, to the bit."""
    weights = "adapter/adapter_model.safetensors"
    if not (run / weights).is_file():
        return False
    return records(run) == records(finished) and (run / weights).read_bytes() == (finished / weights).read_bytes()


def disk(path, options):
    """A small disk at ``path``, instead of what is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True)


def fill(path, pages):
    """Leave so many pages of a disk."""
    left = os.statvfs(path)
    with (path / "ballast").open("wb") as file:
        file.write(bytes(max(0, left.f_bavail - pages) * left.f_bsize))


def free(path):
    (path / "ballast").unlink()


def captured(*words):
    """``[exit code, stdout, stderr]`` of :func:`train`, with what any thread or library writes."""
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            code = train(*words)
        except BaseException:
            code = -1
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return [code, *texts]


if __name__ == "__main__":
    main(*sys.argv[1:])
