"""Experts: PEFT's ``target_parameters``, written and read, against PEFT itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, load_peft, save_peft

LAYERS, EXPERTS, WIDTH, INNER = 2, 3, 8, 6


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 3


def model(params, x):
    """Layers of experts that each see every token, their outputs summed; x (tokens, width)."""
    for layer in params["layers"]:
        every = jnp.broadcast_to(x, (EXPERTS, *x.shape))
        hidden = jnp.einsum("ecd,edf->ecf", every, layer["experts"]["gate_up_proj"])
        hidden = jax.nn.silu(hidden[..., :INNER]) * hidden[..., INNER:]
        x = x + jnp.einsum("ecf,efd->ecd", hidden, layer["experts"]["down_proj"]).sum(0)
        x = x @ layer["out_proj"]["kernel"]
    return x


def base(width=WIDTH):
    return {
        "layers": [
            {
                "experts": {
                    "gate_up_proj": draw(3 * i, EXPERTS, width, 2 * INNER),
                    "down_proj": draw(3 * i + 1, EXPERTS, INNER, width),
                },
                "out_proj": {"kernel": draw(3 * i + 2, width, width)},
            }
            for i in range(LAYERS)
        ]
    }


SPEC = LoraSpec(rank=2, target_modules=["experts.gate_up_proj", "experts.down_proj", "out_proj"])


def trained(spec=SPEC):
    params, x = base(), draw(50, 5, WIDTH)
    lora = adapted(model, spec)
    adapters = lora.init(jax.random.key(0), params, x)
    leaves, structure = jax.tree.flatten(adapters)
    adapters = jax.tree.unflatten(structure, [leaf + draw(60 + i, *leaf.shape) for i, leaf in enumerate(leaves)])
    return lora, params, x, adapters


def torch_model(torch, params):
    class Experts(torch.nn.Module):
        is_transposed = True  # (experts, in, out), as in gpt-oss and Llama 4

        def __init__(self, layer):
            super().__init__()
            for name in ("gate_up_proj", "down_proj"):  # the order of registration
                setattr(self, name, torch.nn.Parameter(torch.tensor(np.asarray(layer["experts"][name]))))

        def forward(self, x):
            hidden = torch.einsum("cd,edf->ecf", x, self.gate_up_proj)
            hidden = torch.nn.functional.silu(hidden[..., :INNER]) * hidden[..., INNER:]
            return torch.einsum("ecf,efd->cd", hidden, self.down_proj)

    class Layer(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.experts = Experts(layer)
            self.out_proj = torch.nn.Linear(WIDTH, WIDTH, bias=False)
            self.out_proj.weight.data = torch.tensor(np.asarray(layer["out_proj"]["kernel"]).T.copy())

        def forward(self, x):
            return self.out_proj(x + self.experts(x))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer(layer) for layer in params["layers"])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return Model()


def test_what_is_written_is_read(tmp_path):
    lora, params, x, adapters = trained()
    save_peft(tmp_path, adapters, SPEC, params=params)
    found, spec = load_peft(tmp_path, params)
    assert spec == SPEC
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["out_proj"]
    assert config["target_parameters"][0] == "layers.0.experts.down_proj"


def test_peft_computes_the_same(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    lora, params, x, adapters = trained()
    save_peft(tmp_path, adapters, SPEC, params=params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    theirs = peft.PeftModel.from_pretrained(torch_model(torch, params), str(tmp_path))
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(x))).numpy()
    np.testing.assert_allclose(lora.apply({"params": params, "lora": adapters}, x), expected, rtol=2e-5, atol=1e-5)


def test_an_adapter_of_peft_is_read(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    _, params, x, _ = trained()
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["out_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    theirs = peft.get_peft_model(torch_model(torch, params), config)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) / 3
    theirs.save_pretrained(str(tmp_path))
    adapters, spec = load_peft(tmp_path, params)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(x))).numpy()
    found = adapted(model, spec).apply({"params": params, "lora": adapters}, x)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_faults_are_named(tmp_path):
    lora, params, _, adapters = trained()
    with pytest.raises(InputError, match="PEFT adapts experts by plain pairs alone"):
        spec = LoraSpec(rank=2, target_modules=SPEC.target_modules, parametrization="dora")
        save_peft(tmp_path / "dora", trained(spec)[3], spec, params=params)
    save_peft(tmp_path, adapters, SPEC, params=params)
    with pytest.raises(InputError, match=r"layers.0.experts.*another model"):
        load_peft(tmp_path, base(width=4))


def test_a_table_and_a_head_of_another_form_than_the_decoders(tmp_path):
    """Names are the decoder's, leaves are not: PEFT's copies of its own embedding and head are not looked for."""

    def decoder(params, tokens):
        return params["model"]["embed_tokens"]["weight"][tokens] @ params["lm_head"]

    params = {"model": {"embed_tokens": {"weight": draw(0, 7, 4)}}, "lm_head": draw(1, 4, 7)}
    spec, tokens = LoraSpec(rank=2, target_modules=["embed_tokens", "lm_head"]), jnp.arange(5)
    lora = adapted(decoder, spec)
    adapters = lora.init(jax.random.key(0), params, tokens)
    save_peft(tmp_path, adapters, spec, params=params)
    found, again = load_peft(tmp_path, params)
    assert again == spec
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
