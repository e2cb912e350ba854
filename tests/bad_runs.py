"""A small world for bad runs: a base, data, an adapter and a run that was stopped; and the command that goes on with it."""

import importlib.util
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import jax

from stablelora_jax import LoraSpec, init_adapters, save_peft, save_pretrained
from stablelora_jax import run as module
from tests.conftest import ROOT
from tests.helpers import tiny_decoder, trained

GOOD = (
    "model.path=base task.name=jsonl task.path=data lora.rank=2 steps=6 batch_size=8 length=16 checkpoint_every=2 "
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
    """Inside, a run gets SIGTERM once it has done so many steps."""

    @contextmanager
    def listening():
        asked = []
        yield lambda: (asked.append(1), signal.SIGTERM if len(asked) > steps else 0)[1]

    before, module.listening = module.listening, listening
    try:
        yield
    finally:
        module.listening = before


def snapshot(place):
    """The bytes of every file, and None for every directory, by relative path; locks left out."""
    return {
        str(path.relative_to(place)): None if path.is_dir() else path.read_bytes()
        for path in sorted(Path(place).rglob("*"))
        if path.name != ".lock"
    }
