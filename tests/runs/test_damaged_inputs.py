"""Damaged files end in one line that names them: no other error, no hang, no memory for sizes that a header makes up.

Every case copies a good model or adapter, spoils it, and opens it by the door that users take. What must be noticed
ends in an ``InputError``; what may be harmless (a random byte) either does or loads.
"""

import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from stablelora_jax import LoraSpec, init_adapters, load_peft, load_pretrained, save_peft, save_pretrained
from stablelora_jax.utils.errors import InputError
from tests.helpers import tiny_decoder, trained
from tests.runs.damage import GGUF_TOKENIZER, cut, key, renamed, tensors, value
from tests.runs.damaged_cases import ADAPTER, MODEL, A, Q, may_be_harmless, must_be_noticed

ROOT = Path(__file__).parents[2]
SEEDS = 25
SECONDS, BYTES = 20, 2 * 2**30  # of one case, on a busy machine; address space beyond what the process has
SPEC = LoraSpec(rank=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One of each: a whole and a sharded model, an adapter and a GGUF file, in folders ``hf shards peft gguf``."""
    pytest.importorskip("gguf")
    from tests.models.gguf_files import hf_tensors, write

    directory = tmp_path_factory.mktemp("good")
    model, params = tiny_decoder(bos_token_id=1, eos_token_id=(2,))
    save_pretrained(directory / "hf", model, params)
    small_tokenizer().save_pretrained(directory / "hf")
    save_pretrained(directory / "shards", model, params, max_shard_size=5000)
    save_peft(directory / "peft", trained(init_adapters(jax.random.key(0), params, SPEC), SPEC), SPEC)
    (directory / "gguf").mkdir()
    write(directory / "gguf" / "m.gguf", hf_tensors(), keys=GGUF_TOKENIZER)
    return directory, params


def small_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(31)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def enter(kind, place, params):
    """Open the files of ``kind`` in the folder ``place``, with little memory and in little time."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    started = time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, hard))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "peft":
                return load_peft(place, params)
            return load_pretrained(place / "m.gguf" if kind == "gguf" else place)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert time.monotonic() - started < SECONDS


def spoiled(tmp_path, good, kind, damage):
    """The message of the ``InputError`` that a damage ends in, or None where it loads; nothing else may happen."""
    directory, params = good
    place = tmp_path / "place"
    shutil.copytree(directory / kind, place)
    damage(place)
    try:
        enter(kind, place, params)
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 1000 and str(place) in message, message
        return message
    return None


MUST = list(must_be_noticed())


def test_good_files_load(good):
    for kind in ("hf", "shards", "peft", "gguf"):
        enter(kind, good[0] / kind, good[1])
    assert len(MUST) > 200


@pytest.mark.parametrize("kind, damage", [pytest.param(kind, f, id=f"{kind} {name}") for kind, name, f in MUST])
def test_damage_is_noticed(tmp_path, good, kind, damage):
    assert spoiled(tmp_path, good, kind, damage) is not None


@pytest.mark.parametrize("kind, damage", [pytest.param(kind, f, id=name) for kind, name, f in may_be_harmless()])
def test_random_damage_is_noticed_or_harmless(tmp_path, good, kind, damage):
    ends = [spoiled(tmp_path / str(seed), good, kind, damage(seed=seed)) for seed in range(SEEDS)]
    assert any(ends)


@pytest.mark.parametrize("command, kind, damage", [
    ("generate.py PLACE --prompt w1", "hf", tensors(MODEL, value(np.nan, Q))),
    ("generate.py GOOD --adapter PLACE --prompt w1", "peft", key("adapter_config.json", "r", "two")),
    ("export.py PLACE --to peft --base GOOD", "peft", tensors(ADAPTER, renamed(A, "lora_A"))),
    ("train.py model.path=PLACE/m.gguf output=null", "gguf", cut("m.gguf", 0.5)),
], ids=["model", "adapter", "export", "train"])  # fmt: skip
def test_commands_say_it_in_one_line(tmp_path, good, command, kind, damage):
    place = tmp_path / "place"
    shutil.copytree(good[0] / kind, place)
    damage(place)
    words = [word.replace("PLACE", str(place)).replace("GOOD", str(good[0] / "hf")) for word in command.split()]
    words = [sys.executable, str(ROOT / "experiments" / words[0]), *words[1:]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1 and str(place) in done.stderr, done.stderr
