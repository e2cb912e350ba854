"""init_adapters, merge, unmerge, hyper, describe."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from stablelora_jax import InputError, LoraSpec, describe, init_adapters, lora_hyperparams, merge, unmerge
from stablelora_jax.lora.pairs import pairs
from tests.helpers import FOREIGN, largest_difference, random_params, tiny_decoder, trained

SPEC = LoraSpec(
    target_modules="all-linear",
    rank=4,
    rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 6},
    alpha_pattern={"v_proj": 5},
    exclude_modules=["layers.2.mlp.gate_proj"],
)


def test_start_is_pefts():
    _, params = tiny_decoder(hidden_size=64, num_hidden_layers=8)
    adapters = init_adapters(jax.random.key(0), params, LoraSpec(rank=32, target_modules=["q_proj", "down_proj"]))
    for path, rows in ((("model", "layers", "self_attn", "q_proj"), 64), (("model", "layers", "mlp", "down_proj"), 24)):
        pair = pairs(adapters)[path]
        bound = rows**-0.5
        assert not pair["lora_b"].any() and pair["lora_a"].dtype == pair["lora_b"].dtype == jnp.float32
        assert float(jnp.abs(pair["lora_a"]).max()) <= bound
        counts, _ = np.histogram(pair["lora_a"], bins=10, range=(-bound, bound))
        np.testing.assert_allclose(counts / counts.sum(), 0.1, atol=0.01)


def test_start_is_that_of_torch_kaiming_uniform():
    torch = pytest.importorskip("torch")
    weight = torch.nn.init.kaiming_uniform_(torch.empty(256, 40), a=5**0.5).numpy()
    _, params = tiny_decoder(hidden_size=40, head_dim=4)
    a = init_adapters(jax.random.key(1), params, LoraSpec(rank=256))["model"]["layers"]["self_attn"]["q_proj"]["lora_a"]
    assert abs(np.abs(weight).max() - float(jnp.abs(a).max())) < 1e-3
    assert abs(weight.std() - float(a.std())) < 2e-3


def test_a_pairs_draw_depends_on_its_name_alone():
    _, params = tiny_decoder()
    few = init_adapters(jax.random.key(0), params, LoraSpec(target_modules=["q_proj"]))
    many = init_adapters(jax.random.key(0), params, LoraSpec(target_modules="all-linear"))
    q = ("model", "layers", "self_attn", "q_proj")
    chex.assert_trees_all_equal(pairs(few)[q], pairs(many)[q])
    a = pairs(many)[q]["lora_a"]
    assert not jnp.array_equal(a[0], a[1])
    apart = {
        "model": {
            "layers": {
                "1": {
                    "self_attn": {"q_proj": {"kernel": params["model"]["layers"]["self_attn"]["q_proj"]["kernel"][1]}}
                }
            }
        }
    }
    alone = init_adapters(jax.random.key(0), apart, LoraSpec(target_modules=["q_proj"]))
    chex.assert_trees_all_equal(pairs(alone)[("model", "layers", "1", "self_attn", "q_proj")]["lora_a"], a[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_nothing_below_float32_is_accepted(dtype):
    _, params = tiny_decoder()
    with pytest.raises(InputError, match="float32 or wider"):
        init_adapters(jax.random.key(0), params, LoraSpec(), dtype=dtype)


def test_adapters_of_a_bfloat16_base_are_float32():
    _, params = tiny_decoder(dtype=jnp.bfloat16)
    adapters = init_adapters(jax.random.key(0), params, LoraSpec())
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
    merged = merge(params, trained(adapters, LoraSpec()), LoraSpec())
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)


def test_init_needs_shapes_only_and_takes_frozen_dicts():
    _, params = tiny_decoder()
    shapes = jax.eval_shape(lambda: params)
    expected = init_adapters(jax.random.key(0), params, SPEC)
    chex.assert_trees_all_equal(init_adapters(jax.random.key(0), shapes, SPEC), expected)
    chex.assert_trees_all_equal(init_adapters(jax.random.key(0), freeze(params), SPEC), expected)
    chex.assert_trees_all_equal(merge(freeze(params), expected, SPEC), params)


def test_padding_is_zero_in_both_factors():
    _, params = tiny_decoder()
    adapters = init_adapters(jax.random.key(0), params, SPEC)["model"]["layers"]
    q, gate = adapters["self_attn"]["q_proj"], adapters["mlp"]["gate_proj"]
    assert q["lora_a"].shape == (3, 16, 4) and not q["lora_a"][1, :, 2:].any() and q["lora_a"][1, :, :2].all()
    assert not gate["lora_a"][2].any() and gate["lora_a"][1].all()


def test_merge_is_the_equation():
    _, params = tiny_decoder()
    adapters = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    merged = merge(params, adapters, SPEC)
    kernel, pair = (t["model"]["layers"]["self_attn"]["q_proj"] for t in (params, adapters))
    for layer, scale in ((0, 16 / 4), (1, 16 / 2), (2, 16 / 4)):
        a, b = (np.float64(pair[name][layer]) for name in ("lora_a", "lora_b"))
        expected = np.float64(kernel["kernel"][layer]) + scale * a @ b
        np.testing.assert_allclose(
            merged["model"]["layers"]["self_attn"]["q_proj"]["kernel"][layer], expected, atol=1e-5
        )
    gate = ("model", "layers", "mlp", "gate_proj", "kernel")
    before, after = (_get(t, gate) for t in (params, merged))
    assert jnp.array_equal(before[2], after[2]) and not jnp.array_equal(before[1], after[1])


def _get(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("case", FOREIGN)
def test_unmerge_undoes_merge(case):
    model, shape, spec = FOREIGN[case]
    params = random_params(model, jnp.zeros(shape))
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    merged = merge(params, adapters, spec)
    assert largest_difference(merged, params) > 1e-2
    assert largest_difference(unmerge(merged, adapters, spec), params) < 1e-5


def test_merging_untrained_adapters_changes_no_bit():
    _, params = tiny_decoder()
    chex.assert_trees_all_equal(merge(params, init_adapters(jax.random.key(0), params, SPEC), SPEC), params)


def test_safe_merge_names_the_layer_that_is_not_finite():
    _, params = tiny_decoder()
    spec = LoraSpec()
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    bad = adapters["model"]["layers"]["self_attn"]["v_proj"]["lora_b"].at[2, 0, 0].set(jnp.nan)
    adapters["model"]["layers"]["self_attn"]["v_proj"]["lora_b"] = bad
    for function in (merge, unmerge):
        with pytest.raises(InputError, match=r"model\.layers\.2\.self_attn\.v_proj"):
            function(params, adapters, spec)
    assert jnp.isnan(
        merge(params, adapters, spec, safe=False)["model"]["layers"]["self_attn"]["v_proj"]["kernel"]
    ).any()


@pytest.mark.parametrize(
    "bad,message",
    [
        (dict(target_modules=["q_prj"]), "target_modules 'q_prj' matches no module; did you mean q_proj"),
        (dict(target_modules=["q_proj", "w1"]), "target_modules 'w1'"),
        (dict(target_modules="model.*q_pro"), "matches no module"),
        (dict(target_modules=["norm"]), "target_modules 'norm'"),
        (dict(modules_to_save=["nrom"]), "modules_to_save 'nrom' matches no module; did you mean norm"),
        (dict(bias="all"), "bias='all': the model has none"),
        (
            dict(target_modules=["embed_tokens"], lora_bias=True),
            "embed_tokens is an embedding, which takes no lora_bias",
        ),
        (dict(target_modules=["q_proj"], modules_to_save=["self_attn"]), "selects no module"),
        (dict(target_modules=["q_proj"], exclude_modules=["qq"]), "exclude_modules 'qq'"),
        (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), "selects no module"),
        (dict(layers_to_transform=[9]), "no layer 9"),
        (dict(rank_pattern={"k_proj": 3}), "rank_pattern 'k_proj' matches no module"),
        (dict(alpha_pattern={"_proj": 3}), "alpha_pattern '_proj'"),
        (dict(in_axes={"nothing": (0,)}), "in_axes 'nothing'"),
        (dict(stacked=("blocks",), target_modules="all-linear"), "no module of the model is called 'blocks'"),
    ],
)
def test_each_pattern_must_match(bad, message):
    _, params = tiny_decoder()
    with pytest.raises(InputError, match=message) as error:
        init_adapters(jax.random.key(0), params, LoraSpec(**bad))
    assert "\n" not in str(error.value)


def test_all_linear_is_never_the_head():
    _, params = tiny_decoder()
    assert "lm_head" in params and "lm_head" not in init_adapters(
        jax.random.key(0), params, LoraSpec(target_modules="all-linear")
    )
    assert "lm_head" in init_adapters(jax.random.key(0), params, LoraSpec(target_modules=["lm_head"]))


def test_adapters_that_do_not_fit_the_model():
    _, params = tiny_decoder()
    _, other = tiny_decoder(hidden_size=32)
    _, deeper = tiny_decoder(num_hidden_layers=4)
    adapters = init_adapters(jax.random.key(0), params, LoraSpec())
    for wrong in (other, deeper):
        with pytest.raises(InputError, match="q_proj: the kernel is"):
            merge(wrong, adapters, LoraSpec())
    with pytest.raises(InputError, match="k_proj is selected by the spec but has no adapters"):
        merge(params, adapters, LoraSpec(target_modules=["q_proj", "v_proj", "k_proj"]))
    with pytest.raises(InputError, match="v_proj, which the spec does not select"):
        merge(params, adapters, LoraSpec(target_modules=["q_proj"]))
    adapters["elsewhere"] = {"q_proj": {"lora_a": jnp.ones((3, 8)), "lora_b": jnp.ones((8, 3))}}
    with pytest.raises(InputError, match="elsewhere.q_proj, but the model has no kernel there"):
        merge(params, adapters, LoraSpec())


def test_hyper_has_the_shape_of_the_stack():
    _, params = tiny_decoder()
    adapters = init_adapters(jax.random.key(0), params, SPEC)
    numbers = lora_hyperparams(SPEC, adapters)["model"]["layers"]
    assert numbers["self_attn"]["q_proj"]["lora_scale"].tolist() == [4.0, 8.0, 4.0]
    assert numbers["mlp"]["gate_proj"]["lora_scale"].tolist() == [4.0, 4.0, 0.0]
    assert numbers["self_attn"]["v_proj"]["lora_scale"].tolist() == [1.25] * 3


def test_describe_counts_without_padding():
    _, params = tiny_decoder()
    text = describe(params, init_adapters(jax.random.key(0), params, SPEC), SPEC)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:-1]}
    assert lines["model.layers.self_attn.q_proj"] == ["3", "of", "3", "16", "16", "2..4", "4..8", "320"]
    assert lines["model.layers.mlp.gate_proj"] == ["2", "of", "3", "16", "24", "4", "4", "320"]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    trained_count = sum(int(values[-1].replace(",", "")) for values in lines.values())
    assert text.splitlines()[-1] == (
        f"trainable params: {trained_count:,} || all params: {total + trained_count:,} || "
        f"trainable%: {100 * trained_count / (total + trained_count):.4f}"
    )


def test_describe_counts_as_peft_does(tmp_path, capsys):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    from stablelora_jax.models.pretrained.load import save_pretrained

    model, params = tiny_decoder()
    save_pretrained(tmp_path, model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        rank_pattern=dict(SPEC.rank_pattern),
        exclude_modules=list(SPEC.exclude_modules),
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(theirs, config).print_trainable_parameters()
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert describe(params, init_adapters(jax.random.key(0), params, SPEC), SPEC).splitlines()[-1] == printed
