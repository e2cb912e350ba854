"""How a script ends, and the options that choose a model."""

import argparse
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from stablelora_jax import InputError, base_directory
from stablelora_jax.parallel import require_devices
from stablelora_jax.runs.cli import add_model_options, exit_code, load_model
from stablelora_jax.utils.errors import Interrupted, RunError


def throw(error):
    raise error


@pytest.mark.parametrize(
    "error,code,line",
    [
        (InputError("no such\nkey"), 2, "error: no such key"),
        (RunError("the disk is full"), 1, "error: the disk is full"),
        (Interrupted(signal.SIGTERM, "interrupted: saved at step 3"), 143, "interrupted: saved at step 3"),
        (Interrupted(signal.SIGINT, "interrupted: saved at step 3"), 130, "interrupted: saved at step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_code(capsys, error, code, line):
    assert exit_code(lambda: throw(error)) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err == line + "\n"


def test_sigterm_is_a_line_and_143(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM), interrupted="stopped") == 143
    assert capsys.readouterr().err == "stopped\n" and signal.getsignal(signal.SIGTERM) == before


def test_the_rest(capsys, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
    assert exit_code(lambda: 7) == 0 and os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert exit_code(lambda: throw(KeyboardInterrupt()), interrupted="come again") == 130
    assert capsys.readouterr().err == "come again\n"
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not hidden
        exit_code(lambda: 1 / 0)
    with pytest.raises(SystemExit):
        exit_code(lambda: throw(SystemExit(3)))


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_a_model_is_chosen(tmp_path):
    model, variables = load_model(parsed(base_directory()))
    assert model.dtype == jnp.float32 and variables.keys() == {"params"}
    model, variables = load_model(parsed(base_directory(), "--dtype", "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("bfloat16")}
    with pytest.raises(InputError, match="--merged needs --adapter, the adapter to merge"):
        load_model(parsed(tmp_path, "--merged"))
    with pytest.raises(SystemExit):
        parsed("model", "--dtype", "float16")


def test_every_option_arrives(monkeypatch):
    from stablelora_jax.interop import load_adapted

    given = []
    monkeypatch.setattr(load_adapted, "load_adapted_model", lambda *a, **k: given.append((*map(str, a), k)))
    load_model(parsed("base", "--adapter", "there", "--merged", "--untie", "--dtype", "bfloat16"))
    load_model(parsed("base", "--adapter", "there", "--strict"))
    assert given == [
        ("base", "there", {"dtype": "bfloat16", "merged": True, "untie": True, "strict": False}),
        ("base", "there", {"dtype": "float32", "merged": False, "untie": False, "strict": True}),
    ]


def test_a_jax_that_compiles_nothing_is_refused():
    with jax.disable_jit(), pytest.raises(InputError, match="JAX_DISABLE_JIT is on"):
        require_devices()
    require_devices()
