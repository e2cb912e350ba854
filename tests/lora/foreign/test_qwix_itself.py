"""qwix as an oracle: with its A and B the adapted model gives what its own LoRA model gives. Skipped without qwix."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from stablelora_jax import LoraSpec, adapted
from tests.lora.foreign.laws import pairs, relative_difference
from tests.lora.foreign.nnx_models import Qwen3
from tests.lora.foreign.nnx_rows import TOKENS, Holder, x

MODELS = {
    "linear": (lambda rngs: Holder(nnx.Linear(6, 4, rngs=rngs)), x(5, 6)),
    "einsum": (lambda rngs: Holder(nnx.Einsum("btd,dnh->btnh", (6, 2, 4), (2, 4), rngs=rngs)), x(5, 6)),
    "conv": (lambda rngs: Holder(nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)), x(6, 6, 4)),
    "qwen3": (lambda rngs: Qwen3(rngs=rngs), TOKENS),
}
R, ALPHA = 2, 3.0


def by_module(lora_params):
    """qwix's pairs by the path of their module: ``{path: (a, b)}``, whatever the leaf that they belong to is called."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(lora_params)):
        *module, name = (str(key.key) for key in path)
        found.setdefault(tuple(module), {})[name[-len("lora_a") :]] = leaf
    return found


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_qwix(name):
    qwix = pytest.importorskip("qwix")
    make, inputs = MODELS[name]
    model = make(nnx.Rngs(0))
    rule = qwix.LoraProvider(
        module_path=r".*(_proj|inner).*", rank=R, alpha=ALPHA, lora_b_initializer=nnx.initializers.normal(0.3)
    )
    theirs = qwix.apply_lora_to_model(model, rule, inputs, rngs=nnx.Rngs(1))
    given = by_module(nnx.state(theirs, nnx.LoRAParam))

    params = nnx.state(model, nnx.Param)
    lora = adapted(model, LoraSpec(target_modules="all-linear", rank=R, alpha=ALPHA))
    adapters = lora.init(jax.random.key(0), params, inputs)
    own = pairs(adapters)
    assert own.keys() == given.keys()
    for path, pair in own.items():  # qwix keeps the axes of a kernel
        for factor in ("lora_a", "lora_b"):
            pair[factor] = given[path][factor].reshape(pair[factor].shape)
    found, expected = lora.apply({"params": params, "lora": adapters}, inputs), theirs(inputs)
    assert relative_difference(found, expected) < 1e-5
    assert relative_difference(found, model(inputs)) > 1e-2
