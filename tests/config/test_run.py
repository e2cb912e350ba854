"""``RunConfig``: made in Python it is checked as from a file; old names point to the new ones."""

from dataclasses import fields, is_dataclass, replace

import pytest

from stablelora_jax import InputError, LoraSpec, config
from stablelora_jax.config.keys import keys_of, old_names, sections
from stablelora_jax.config.run import DataConfig, ModelConfig, RunConfig

OLD = {
    "length=64": "max_length",
    "accumulate=2": "gradient_accumulation_steps",
    "clip_norm=null": "max_grad_norm",
    "show=2": "num_samples",
    "adapter=run": "init_from",
    "lora.target=[q_proj]": "lora.target_modules",
    "lora.exclude=[q_proj]": "lora.exclude_modules",
    "lora.layers=[0]": "lora.layers_to_transform",
    "model.remat=useful": "save_dots",
    "model.attention=blocks": "blockwise",
    "data.truncate=refuse": "error",
}


@pytest.mark.parametrize("text", OLD)
def test_an_old_name_is_refused_with_the_new_one(text, tmp_path):
    with pytest.raises(InputError, match=f"is now called {OLD[text]}$"):
        config.load(RunConfig, None, [text])
    key, value = text.split("=")
    *above, last = key.split(".")
    file = tmp_path / "c.yaml"
    file.write_text("".join(f"{part}: {{" for part in above) + f"{last}: {value}" + "}" * len(above))
    with pytest.raises(InputError, match=f"c.yaml: {key}.* is now called {OLD[text]}$"):
        config.load(RunConfig, file)
    made = config.load(RunConfig, file, accept_old_names=True)
    assert config.to_dict(made) != config.to_dict(RunConfig())


def test_every_old_name_is_in_the_table():
    found = set(old_names(RunConfig)) | {f"lora.{name}" for name in old_names(LoraSpec)}
    for section, cls in (("model", ModelConfig), ("data", DataConfig)):
        found |= {f"{section}.{f.name}={old}" for f in fields(cls) for old in f.metadata["renamed"]}
    assert found == {
        text if text.partition("=")[0].startswith(("model", "data")) else text.partition("=")[0] for text in OLD
    }


def test_with_new_names_leaves_what_is_new():
    new = config.to_dict(RunConfig())
    assert config.with_new_names(RunConfig, new) == new
    old = {**new, "length": new["max_length"], "lora": {**new["lora"], "target": ["q_proj"]}}
    del old["max_length"], old["lora"]["target_modules"]
    made = config.with_new_names(RunConfig, old)
    assert made["max_length"] == new["max_length"] and made["lora"]["target_modules"] == ["q_proj"]
    assert config.with_new_names(RunConfig, None) is None


@pytest.mark.parametrize("old", ["target", "exclude", "layers"])
def test_a_spec_refuses_old_names(old):
    with pytest.raises(InputError, match=f"LoraSpec: {old} is now called {old_names(LoraSpec)[old]}"):
        LoraSpec(**{old: ["q_proj"]})
    with pytest.raises(InputError, match="RunConfig: length is now called max_length"):
        replace(RunConfig(), length=3)


def test_a_section_may_be_a_dict():
    made = RunConfig(
        lora={"rank": 4, "target_modules": ["q_proj"]}, optimizer={"name": "lora_rite"}, model={"untie": True}
    )
    assert made.lora == LoraSpec(rank=4, target_modules=["q_proj"]) and made.optimizer.name == "lora_rite"
    assert (
        made.model == ModelConfig(untie=True) and config.load(RunConfig, None, ["model.untie=true"]).model == made.model
    )
    one_of_many = RunConfig(task={"name": "jsonl", "path": "d"}, parallel={"name": "mesh", "data": 2})
    assert one_of_many.task.name == "jsonl" and one_of_many.parallel.data == 2


def test_every_section_of_a_config_is_a_dataclass():
    for name, (_, kind) in keys_of(RunConfig).items():
        assert not sections(kind) or getattr(RunConfig(), name) is None or is_dataclass(getattr(RunConfig(), name))


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(lora=3), "lora holds keys .*, not 3"),
        (dict(lora={"ranks": 4}), "lora.ranks is not a key .did you mean lora.rank"),
        (dict(lora={"rank": "4"}), "lora.rank wants int, got '4'"),
        (dict(model="base"), "model holds keys"),
        (dict(optimizer={"name": "adam"}), "optimizer.name wants .*got 'adam'"),
        (dict(steps="3"), "steps wants int, got '3'"),
        (dict(evaluate=1), "evaluate wants bool, got 1"),
        (dict(trackers="wandb"), "trackers wants"),
        (dict(epochs=float("nan")), "epochs wants"),
    ],
)
def test_other_types_are_one_line(given, message):
    with pytest.raises(InputError, match=message) as caught:
        RunConfig(**given)
    assert "\n" not in str(caught.value)
