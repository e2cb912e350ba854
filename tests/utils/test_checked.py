"""The public door: a wrong kind of argument is one line that names function, argument and what was given."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablelora_jax
from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, make_bank
from stablelora_jax.generation.bank import replace_adapter
from stablelora_jax.utils.checked import as_dtype, checked
from tests.helpers import tiny_decoder


@checked
def door(a: int, b: float = 1.0, *, c: Mapping[str, Any] | None = None, d: Sequence[str] = (), e: Any = None) -> str:
    """A function of several kinds."""
    return f"{a} {b}"


@pytest.mark.parametrize("given", [(1,), (1, 2), (1, 2.5), (1, True)])
def test_what_fits_passes(given):
    assert door(*given).startswith("1 ") and door(1, c={"x": 1}, d=["y"], e=object()) == "1 1.0"


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: door("x"), "door: a must be int, not 'x'"),
        (lambda: door(1, "2"), "door: b must be float, not '2'"),
        (lambda: door(1, c=[1]), "door: c must be Mapping[str, Any] | None, not [1]"),
        (lambda: door(1, d=3), "door: d must be Sequence[str], not 3"),
        (lambda: door(1, c="x\ny" * 99), "door: c must be Mapping[str, Any] | None, not 'x"),
    ],
)
def test_what_does_not_is_one_line(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value) and len(str(caught.value)) < 140


def test_errors_of_the_function_itself_pass():
    @checked
    def fails(a: int) -> int:
        raise {0: TypeError, 1: InputError}[a]("own")

    for number, kind in enumerate((TypeError, InputError)):
        with pytest.raises(kind, match="own"):
            fails(number)
    assert inspect.signature(door).return_annotation is str and door.__doc__ == "A function of several kinds."


def test_a_dtype():
    assert as_dtype("bfloat16") == jnp.bfloat16 and as_dtype(np.float32) == jnp.float32
    for value in ("x", 3, {"a": 1}, len):
        with pytest.raises(InputError, match="dtype must be a dtype, such as float32"):
            as_dtype(value)


WRONG = [None, 3, "x", [], (), {}, {"model": None}, {1}, object(), float("nan"), len, np.ones(3), b"x", 1.5]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Arguments with which every public function works, by name."""
    model, params = tiny_decoder()
    spec = LoraSpec(rank=2)
    adapters = init_adapters(jax.random.key(0), params, spec)
    bank = make_bank(params, [(adapters, spec)])
    directory = tmp_path_factory.mktemp("a") / "b"
    stablelora_jax.save_peft(directory, adapters, spec)
    variables = {"params": params, "lora": adapters}
    return {
        "init_adapters": (init_adapters, dict(key=jax.random.key(0), params=params, spec=spec)),
        "merge": (stablelora_jax.merge, dict(params=params, adapters=adapters, spec=spec)),
        "unmerge": (stablelora_jax.unmerge, dict(params=params, adapters=adapters, spec=spec)),
        "describe": (stablelora_jax.describe, dict(params=params, adapters=adapters, spec=spec)),
        "hyper": (stablelora_jax.lora_hyperparams, dict(spec=spec, adapters=adapters)),
        "combine": (stablelora_jax.combine, dict(adapters=[(adapters, spec)], weights=[1.0], method="linear")),
        "make_bank": (make_bank, dict(params=params, parts=[(adapters, spec)], size=2)),
        "swap": (replace_adapter, dict(bank=bank, index=0, adapters=adapters, spec=spec)),
        "untie": (stablelora_jax.untie, dict(model=tiny_decoder(tie_word_embeddings=True)[0], params=params)),
        "frozen": (stablelora_jax.freeze_mask, dict(params=params, adapters=adapters, spec=spec, patterns=["lora_a"])),
        "freeze": (stablelora_jax.freeze, dict(tx=optax.sgd(1.0), mask={})),
        "load_peft": (stablelora_jax.load_peft, dict(directory=directory, params=params)),
        "start_adapters": (stablelora_jax.start_adapters, dict(directory=directory, params=params, spec=spec)),
        "load_pretrained": (stablelora_jax.load_pretrained, dict(path_or_id=stablelora_jax.base_directory())),
        "adapted": (
            lambda **kw: adapted(**kw).apply(variables, jnp.ones((1, 2), jnp.int32)),
            dict(model=model, spec=spec),
        ),
        "apply": (
            lambda **kw: adapted(model, spec).apply(kw["variables"], jnp.ones((1, 2), jnp.int32)),
            dict(variables=variables),
        ),
    }


CASES = {
    "init_adapters": ("key", "params", "spec"),
    "merge": ("params", "adapters", "spec"),
    "unmerge": ("params", "adapters", "spec"),
    "describe": ("params", "adapters", "spec"),
    "hyper": ("spec", "adapters"),
    "combine": ("adapters", "weights", "method"),
    "make_bank": ("params", "parts", "size"),
    "swap": ("bank", "index", "adapters", "spec"),
    "untie": ("model", "params"),
    "frozen": ("params", "adapters", "spec", "patterns"),
    "freeze": ("tx",),
    "load_peft": ("directory", "params"),
    "start_adapters": ("directory", "params", "spec"),
    "load_pretrained": ("path_or_id",),
    "adapted": ("model", "spec"),
    "apply": ("variables",),
}
# None, or an empty mapping or list, means something there; a function is a model
FITS = {("make_bank", "size", 0), ("make_bank", "size", 1), ("adapted", "model", 10)} | {
    ("frozen", "patterns", i) for i in (3, 4, 5)
}


@pytest.mark.parametrize("name", CASES)
def test_every_public_function_names_what_it_cannot_take(good, name):
    function, arguments = good[name]
    function(**arguments)
    for argument in CASES[name]:
        for number, wrong in enumerate(WRONG):
            if (name, argument, number) in FITS:
                continue
            with pytest.raises(InputError) as caught:
                function(**{**arguments, argument: wrong})
                pytest.fail(f"{name} takes {argument}={wrong!r}")
            assert "\n" not in str(caught.value), (argument, wrong)
