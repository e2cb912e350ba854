"""However a run lies on its devices, it is the same run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, LoraSpec
from stablelora_jax.parallel import mesh_layout, pmap_layout
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import make_train_step
from tests.helpers import largest_difference
from tests.parallel.cases import HALF, LAYOUTS, TX, batches, go, make, problem


def few(name):
    """The others take a minute and more to compile."""
    if name in ("one device", "pmap 8", "mesh 2 2 2, 4 micro-batches"):
        return name
    return pytest.param(name, marks=pytest.mark.long if name in ("pmap 4", "mesh 2 4 1") else pytest.mark.soak)


NAMES = [few(name) for name in LAYOUTS]


@pytest.fixture(scope="module")
def wide(request):
    """Layouts in float64 with dropout: their steps, their losses, and their state after half of the steps."""
    jax.config.update("jax_enable_x64", True)
    model, params, start = problem(jnp.float64, 0.1)
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    chosen = {item.callspec.params["name"] for item in here if not item.get_closest_marker("skip")} | {"one device"}
    found = {}
    for name in (name for name in LAYOUTS if name in chosen):
        layout, step, placed = make(name, model, params)
        half, losses = go(step, layout, placed, start, batches()[:HALF])
        end, more = go(step, layout, placed, half, batches()[HALF:])
        found[name] = (layout, step, placed, half, end, np.concatenate([losses, more]))
    yield found
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_adapters_are_those_of_one_device(wide, name):
    _, _, _, _, end, losses = wide[name]
    _, _, _, _, expected, wanted = wide["one device"]
    assert np.abs(losses / wanted - 1).max() < 1e-9 and losses[-1] < losses[0]
    assert largest_difference(end.adapters, expected.adapters) < 1e-9
    assert largest_difference(end.opt_state, expected.opt_state) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_goes_on_in_every_layout(wide, name, tmp_path):
    checkpoint.save(tmp_path / "c", HALF, wide[name][3])
    expected = wide["one device"][5]
    for other, (layout, step, placed, half, _, _) in wide.items():
        state = checkpoint.restore(tmp_path / "c", half)
        _, losses = go(step, layout, placed, state, batches()[HALF : HALF + 2])
        assert np.abs(losses / expected[HALF : HALF + 2] - 1).max() < 1e-9, (name, other)


@pytest.mark.long
def test_in_float32_without_dropout():
    model, params, start = problem(jnp.float32, 0.0)
    names = ["one device", "pmap 8", "mesh 2 2 2", "mesh 1 1 8"]
    found = {}
    for name in names:
        layout, step, placed = make(name, model, params)
        found[name] = go(step, layout, placed, start, batches())[1]
    assert all(np.abs(losses / found["one device"] - 1).max() < 1e-4 for losses in found.values())


@pytest.mark.long
def test_what_does_not_divide_stays_whole_and_right():
    """Two groups of heads, a vocabulary of 353 and an MLP of 36 cannot be split over eight devices."""
    model, params, start = problem(jnp.float32, 0.0, num_key_value_heads=2, vocab_size=353, intermediate_size=36)
    found = []
    for layout in (pmap_layout(jax.devices()[:1]), mesh_layout(1, 1, 8, key_value_heads=2)):
        step = make_train_step(model, TX, layout)
        found.append(go(step, layout, layout.place_base(params), start, batches(5))[1])
    assert np.abs(np.array(found) / found[0] - 1).max() < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("name", ["unilora", "tied_lora", "bat", "shira", "dota"])
def test_what_modules_share_or_change_whole_learns_as_on_one_device(name):
    """Two steps; every device holds all of the adapters, whatever it holds of the kernel that they change."""
    options = {"length": 64} if name == "unilora" else {}
    spec = LoraSpec(parametrization=name, rank=2, target_modules=["q_proj", "down_proj"], options=options)
    tx = optax.adamw(1e-2)
    model, params, start = problem(jnp.float32, 0.0, tx, spec, num_hidden_layers=1)
    found = {}
    for key in ("one device", "pmap 4", "mesh 2 2 2"):
        layout, step, placed = make(key, model, params, tx)
        state = layout.place_state(start)
        assert key[:4] != "mesh" or all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.adapters))
        found[key] = go(step, layout, placed, start, batches(2))[0].adapters
    assert largest_difference(found["one device"], start.adapters) > 1e-3
    assert all(largest_difference(found["one device"], other) < 1e-5 for other in found.values())


def test_meshes_that_are_not_the_devices():
    with pytest.raises(InputError, match=r"a mesh of 2 x 2 x 1 \(data, fsdp, tensor\) is not 8 devices"):
        mesh_layout(2, 2)
    with pytest.raises(InputError, match="a mesh of 2 x 3 x 1 .* is not 8 devices"):
        mesh_layout(None, 3)
    with pytest.raises(InputError, match="positive sizes"):
        mesh_layout(0)
    assert mesh_layout(None, 2).parts == 8 and mesh_layout(None, 2, 2).parts == 4
