"""Linen models that are not ours, with modules of their own, obey the laws of adapters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import pytest

from stablelora_jax import InputError, LoraSpec, adapted
from tests.helpers import jit, long, soak
from tests.lora.foreign import laws, linen_models
from tests.lora.foreign.linen_models import split_stack

ROWS = {
    "vit": linen_models.vit,
    "vit unrolled": partial(linen_models.vit, False),
    "vit function": linen_models.vit_function,
    "unet": linen_models.unet,
    "unet function": linen_models.unet_function,
    "t5": linen_models.t5,
    "t5 n-D": partial(linen_models.t5, True, False),
    "t5 unrolled": partial(linen_models.t5, False, False),
    "gemma": linen_models.gemma,
    "gemma unrolled": partial(linen_models.gemma, False),
    "gemma all-linear": linen_models.gemma_all_linear,
    "experts vmap": linen_models.vmap_experts,
    "experts einsum": linen_models.einsum_experts,
    "experts ragged": linen_models.ragged_experts,
    "experts dense": linen_models.dense_experts,
    "experts dense stacked": partial(linen_models.dense_experts, True),
}
NO_DORA = ("experts ragged", "experts dense stacked")  # refused: see the tests below


def quick(*names, but=(), rest=long):
    """All rows less those in ``but``; all but ``names`` are ``long``, or ``rest``."""
    return [name if name in names else rest(name) for name in ROWS if name not in but]


@pytest.mark.parametrize("name", ROWS)
def test_adapters_are_as_the_author_expects(name):
    laws.adapters_are_as_expected(ROWS[name]())


@pytest.mark.parametrize("name", quick("gemma", "vit function", "experts ragged", "experts einsum"))
def test_apply_is_merge(name):
    laws.apply_is_merge(ROWS[name](), "lora")


@pytest.mark.parametrize("name", quick("gemma", rest=soak))
def test_apply_is_merge_with_rslora(name):
    laws.apply_is_merge(ROWS[name](), "rslora")


@pytest.mark.parametrize("name", quick("gemma", "experts einsum", but=NO_DORA))
def test_apply_is_merge_with_dora(name):
    laws.apply_is_merge(ROWS[name](), "dora")


@pytest.mark.parametrize("name", quick("gemma", "vit function", "experts ragged"))
def test_fresh_adapters_change_nothing(name):
    laws.fresh_adapters_change_nothing(ROWS[name]())


@pytest.mark.parametrize("name", quick("gemma", "unet function", "experts ragged", rest=soak))
def test_training_lowers_the_loss(name):
    laws.training_lowers_the_loss(ROWS[name]())


@pytest.mark.parametrize("name", quick("gemma", rest=soak))
def test_devices_change_nothing(name):
    laws.devices_change_nothing(ROWS[name]())


@pytest.mark.parametrize("name", quick("gemma", "experts ragged", "t5"))
def test_peft_round_trip(name, tmp_path):
    laws.peft_round_trip(ROWS[name](), tmp_path)


def test_scanned_vit_is_unrolled():
    split = partial(split_stack, stack="Transformer.encoderblock", layer="encoderblock", length=3)
    laws.stacked_is_separate(linen_models.vit(), linen_models.vit(False), split)


def test_scanned_gemma_is_unrolled():
    split = partial(split_stack, stack="layers", layer="layer", length=2)
    laws.stacked_is_separate(linen_models.gemma(), linen_models.gemma(False), split)


def test_scanned_t5_is_unrolled():
    def split(tree, axis=0):
        tree = split_stack(tree, "encoder", "encoder", 2, axis)
        return split_stack(tree, "decoder", "decoder", 2, axis)

    laws.stacked_is_separate(linen_models.t5(True, False), linen_models.t5(False, False), split, partial(split, axis=1))


def test_boxed_parameters_are_refused():
    """``nn.with_logical_partitioning`` leaves boxes in the tree; the message says how to open them."""
    row = linen_models.einsum_experts()
    boxed = row.model.init(jax.random.key(0), *row.args)["params"]
    with pytest.raises(InputError, match="boxed.*unbox"):
        row.lora().init(jax.random.key(0), boxed, *row.args)
    adapters = row.lora().init(jax.random.key(0), nn.meta.unbox(boxed), *row.args)
    assert jax.tree.structure(adapters) == jax.tree.structure(row.fresh())


def test_init_takes_shapes():
    row = linen_models.gemma()
    params, args = jax.eval_shape(lambda: (row.params, row.args))
    adapters = row.lora().init(jax.random.key(3), params, *args)
    assert laws.relative_difference(adapters, row.fresh()) == 0


@pytest.mark.parametrize(
    "row, target, why",
    [
        (linen_models.vit, "pos_embedding", "pos_embedding"),
        (linen_models.vit, "probe", "probe"),
        (linen_models.unet, "depthwise", "grouped convolution"),
    ],
)
def test_a_leaf_that_no_pair_can_follow_is_refused_by_name(row, target, why):
    row = row()
    with pytest.raises(InputError, match=f"(?s){target}.*{why}|{why}.*{target}"):
        adapted(row.model, LoraSpec(target_modules=[target])).init(jax.random.key(0), row.params, *row.args)


@pytest.mark.parametrize("row, target", [(linen_models.vit, "pos_embedding"), (linen_models.unet, "depthwise")])
def test_such_a_leaf_can_be_merged_inside_apply(row, target):
    row = row()
    lora = adapted(
        row.model, LoraSpec(target_modules=[target, "conv1" if target == "depthwise" else "query"]), merged=(target,)
    )
    adapters = laws.perturbed(lora.init(jax.random.key(0), row.params, *row.args))
    assert any(path[-1] == target for path in laws.pairs(adapters))
    found = jit(partial(row.run, lora))(row.params, adapters, *row.args)
    expected = jit(row.base)(lora.merge(row.params, adapters), *row.args)
    assert laws.relative_difference(found, expected) < row.tolerance


@pytest.mark.parametrize("row", [linen_models.ragged_experts, partial(linen_models.dense_experts, True)])
def test_dora_where_gains_cannot_be_taken_out_is_refused(row):
    row = row()
    with pytest.raises(InputError, match="(gate_up|down).*(DoRA|gain)"):
        row.run(row.lora(parametrization="dora"), row.params, row.fresh(parametrization="dora"), *row.args)


def test_ranks_by_layer_of_a_stack_that_the_spec_does_not_name():
    """Layers are padded to the largest rank; those that are left out have rank 0."""
    row = linen_models.t5()
    row = replace(
        row,
        spec=replace(
            row.spec, target_modules=("query", "wo"), stacked=("encoder", "decoder"), layers_to_transform=(1,)
        ),
    )
    adapters = row.fresh()
    query = adapters["encoder"]["attention"]["query"]
    assert query["lora_a"].shape == (2, 8, 2)
    assert not query["lora_a"][0].any() and query["lora_a"][1].any()


def test_all_linear_of_t5_has_no_embedding():
    """Tables are no linear layers, though a one-hot product reads them."""
    row = linen_models.t5()
    found = {
        path[-1]
        for path in laws.pairs(row.lora(target_modules="all-linear").init(jax.random.key(0), row.params, *row.args))
    }
    assert found == {"query", "key", "value", "out", "wi_0", "wi_1", "wo"}
