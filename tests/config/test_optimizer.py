"""Every optimizer from a file: typed keys from its own signature, and a trainer that needs nothing else to run it."""

import inspect
from dataclasses import asdict, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from stablelora_jax import InputError, LoraSpec, config, init_adapters, load_pretrained, optimizers
from stablelora_jax.config.help import meanings_of
from stablelora_jax.config.optimizer import CONFIGS, NOT_IN_A_FILE, OPTIMIZERS, shrink_ratio, trained_part
from stablelora_jax.config.run import RunConfig
from stablelora_jax.models.pretrained.load import base_directory
from stablelora_jax.runs.build import make_optimizer
from stablelora_jax.runs.records import each_record
from stablelora_jax.runs.run import run
from tests.conftest import ROOT
from tests.helpers import long
from tests.runs.test_run import SHORT


def load(*overrides):
    return config.load(RunConfig, None, overrides)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keys_and_defaults_are_those_of_the_function(name):
    loaded = load(f"optimizer.name={name}").optimizer
    assert type(loaded) is CONFIGS[name] and loaded == CONFIGS[name]()
    own = inspect.signature(OPTIMIZERS[name]).parameters
    for key, parameter in own.items():
        if key in NOT_IN_A_FILE:
            assert not hasattr(loaded, key)
        elif parameter.default is not inspect.Parameter.empty:
            assert getattr(loaded, key) == parameter.default
    assert f"  {name}" in config.help_text(RunConfig, "optimizer")
    assert "optimizer.learning_rate: float = " in config.help_text(RunConfig, f"optimizer.{name}")
    with pytest.raises(InputError, match="optimizer.ratoi is not a key"):
        load(f"optimizer.name={name}", "optimizer.ratoi=3")
    for key in ("b1", "b2", "shrink_ratio"):
        if hasattr(loaded, key):
            with pytest.raises(InputError, match=f"{key} must be in"):
                load(f"optimizer.name={name}", f"optimizer.{key}=1.5")
    with pytest.raises(InputError, match="learning_rate must not be negative"):
        load(f"optimizer.name={name}", "optimizer.learning_rate=-1")


def test_every_key_has_a_meaning():
    for cls in CONFIGS.values():
        assert cls.__doc__
        for key, meaning in meanings_of(cls).items():
            assert key == "name" or (meaning and "`" not in meaning and meaning[0] not in " ,."), (cls, key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_built_with_its_scale_and_schedule(name):
    around = [] if name == "stable_lora" else ["optimizer.shrink_until_stable=1e-3"]
    loaded = load(f"optimizer.name={name}", "lora.alpha=32", "steps=5", *around)
    _, params = load_pretrained(base_directory())
    adapters = init_adapters(jax.random.key(0), params, loaded.lora)
    tx = make_optimizer(loaded, adapters)
    updates, state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), adapters)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, adapters)
    assert len(optimizers.latches(state)) == 1  # the shrink is around it once, for stable_lora too


def test_the_scale_reaches_the_rule():
    pair = {"p": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}}
    spec = LoraSpec(target_modules=["p"], rank=2, alpha=8)
    chosen = replace(load("optimizer.name=altlora", "schedule.name=constant", "max_grad_norm=null"), lora=spec)
    tx, direct = make_optimizer(chosen, pair), optimizers.altlora(1e-3, scale=4.0)
    ours, expected = (t.update(pair, t.init(pair), pair)[0] for t in (tx, direct))
    chex.assert_trees_all_close(ours, expected)


@pytest.mark.parametrize("options", ["form=half", "projection=left", "variant=mine"])
def test_an_unknown_option_is_one_line(options):
    with pytest.raises(InputError, match="wants"):
        load("optimizer.name=lora_pro", f"optimizer.{options}")


@pytest.mark.parametrize("name", ["lora_fa", long("lora_rite")])
def test_a_run_with_another_optimizer(tmp_path, name):
    chosen = replace(SHORT, optimizer=CONFIGS[name](learning_rate=1e-3), output=str(tmp_path / "r"))
    run(chosen, lambda _: None)
    _, params = load_pretrained(base_directory())
    start = init_adapters(jax.random.key(chosen.seed), params, chosen.lora)
    saved = load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    name_of = next(key for key in saved if key.endswith("layers.0.self_attn.q_proj.lora_A.weight"))
    drawn = np.asarray(start["model"]["layers"]["self_attn"]["q_proj"]["lora_a"][0]).T
    assert np.array_equal(saved[name_of], drawn) == (name == "lora_fa")
    records = list(each_record(tmp_path / "r" / "metrics.jsonl"))
    assert all(record["shrinking"] == 0 for record in records if "loss" in record)


def test_every_key_can_be_written_in_a_file(tmp_path):
    for name, cls in CONFIGS.items():
        path = tmp_path / f"{name}.yaml"
        lines = [f"  {key}: {yaml.safe_dump(value).splitlines()[0]}" for key, value in asdict(cls()).items()]
        path.write_text("optimizer:\n" + "\n".join(lines) + "\n")
        assert config.load(RunConfig, path).optimizer == cls()


def test_names_ratios_and_nulls():
    assert load("optimizer.name=riemannian", "optimizer.delta=0.1").optimizer.delta == 0.1
    assert load("optimizer.name=oplora", "optimizer.momentum=null").optimizer.momentum is None
    with pytest.raises(InputError, match="momentum must be in"):
        load("optimizer.name=oplora", "optimizer.momentum=1.5")
    assert shrink_ratio(load().optimizer) == 5e-4 and shrink_ratio(load("optimizer.shrink_ratio=0").optimizer) is None
    assert shrink_ratio(load("optimizer.name=adamw").optimizer) is None
    assert shrink_ratio(load("optimizer.name=adamw", "optimizer.shrink_until_stable=1e-3").optimizer) == 1e-3
    with pytest.raises(InputError, match="shrink_ratio is not a key"):  # a baseline never goes on shrinking unseen
        load("optimizer.name=adamw", "optimizer.shrink_ratio=5e-4")


def test_readme_has_a_row_for_every_optimizer():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    for name in OPTIMIZERS:
        assert name == "adamw" or any(row.startswith(f"| `{name}`") for row in rows), name


def test_only_lora_fa_holds_a_constant():
    pair = {"p": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}}
    for name in OPTIMIZERS:
        seen = trained_part(CONFIGS[name]())
        grads = jax.grad(lambda p, seen=seen: sum(leaf.sum() for leaf in jax.tree.leaves(seen(p))))(pair)
        assert bool(grads["p"]["lora_a"].any()) == (name != "lora_fa") and grads["p"]["lora_b"].all()
