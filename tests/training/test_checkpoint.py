"""Orbax keeps a training state to the last bit, on any layout, whatever happens to the writer or the disk."""

import json
import random
import shutil
import subprocess
import sys
import zlib
from dataclasses import asdict
from types import SimpleNamespace
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stablelora_jax import InputError, LoraSpec, init_adapters, stable_lora, still_shrinking
from stablelora_jax.training import checkpoint
from stablelora_jax.training.checkpoint import writing
from stablelora_jax.training.step import init_state
from stablelora_jax.utils.errors import RunError
from stablelora_jax.utils.fingerprint import fingerprint
from tests.helpers import tiny_decoder, trained
from tests.optimizers.members import MEMBERS


def make_state(spec=None, seed=5):
    _, params = tiny_decoder()
    spec = spec or LoraSpec(layers_to_transform=(0, 2))
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec, seed)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), stable_lora(optax.cosine_decay_schedule(1e-2, 9), shrink_ratio=1e-2)
    )
    state = init_state(adapters, tx, jax.random.key(3))
    _, opt_state = tx.update(jax.tree.map(jnp.ones_like, adapters), state.opt_state, adapters)
    return jax.tree.map(np.asarray, state._replace(step=state.step + 1, opt_state=opt_state))


class Node(NamedTuple):
    count: object
    rest: object


def zoo(seed=0):
    """Every kind of leaf and node."""
    rng = np.random.default_rng(seed)
    return {
        "wide": rng.normal(size=(40, 50)),
        "bits": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        "half": jnp.asarray(rng.normal(size=(3, 2)), jnp.bfloat16),
        "node": Node(np.int32(seed), (optax.EmptyState(), optax.MaskedNode(), None, [np.ones((), bool)], {}, ())),
        "empty": np.zeros((0, 3), np.int8),
        "zeros": jnp.zeros((4, 4)),  # which TensorStore does not write at all
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "turned": rng.normal(size=(4, 3)).astype(np.float32).T,
        "number": 7 + seed,
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (jax.random.key_data(z) if checkpoint.leaves.is_key(z) else z for z in (x, y))
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 1500
    return text


# round trips


def test_round_trip_is_bit_exact(tmp_path):
    state = make_state()
    manager = checkpoint.open_manager(tmp_path / "c")
    checkpoint.save(manager, 1, state)
    manager.wait_until_finished()
    manager.close()
    again = checkpoint.restore(checkpoint.open_manager(tmp_path / "c"), make_state(seed=9))
    chex.assert_trees_all_equal(again, state)
    assert type(again) is type(state) and still_shrinking(again.opt_state) == still_shrinking(state.opt_state)
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_every_kind_of_leaf_and_node(tmp_path):
    state = zoo()
    checkpoint.save(tmp_path / "c", 3, state)  # a directory is enough
    again = checkpoint.restore(tmp_path / "c", zoo(1))
    assert_same(again, state)
    assert type(again["number"]) is int and type(again["node"]) is Node and isinstance(again["half"], jax.Array)
    assert all(type(again[name]) is np.ndarray for name in ("wide", "bits", "empty", "turned"))
    assert not any(again[name].committed for name in ("half", "key", "keys"))  # so they go with arrays of any mesh
    assert again["keys"].dtype == state["keys"].dtype
    abstract = jax.eval_shape(lambda: {name: zoo()[name] for name in ("half", "zeros")})
    checkpoint.save(tmp_path / "d", 3, {name: state[name] for name in abstract})
    assert_same(checkpoint.restore(tmp_path / "d", abstract), {name: np.asarray(state[name]) for name in abstract})


@pytest.mark.parametrize("name", MEMBERS)
def test_every_optimizer_state(name, tmp_path):
    rng = np.random.default_rng(0)
    pair = lambda *stack: {"lora_a": jnp.ones((*stack, 7, 2)), "lora_b": jnp.ones((*stack, 2, 5))}
    start = MEMBERS[name].make(1e-2).init({"layers": {"q": pair(3)}, "head": pair()})
    noise = lambda x: jnp.asarray(rng.integers(0, 2, x.shape) if x.dtype.kind in "ibu" else rng.normal(size=x.shape))
    state = jax.tree.map(lambda x: noise(x).astype(x.dtype), {"opt_state": start, "step": jnp.int32(4)})
    checkpoint.save(tmp_path / "c", 4, state)
    assert_same(checkpoint.restore(tmp_path / "c", {"opt_state": start, "step": jnp.int32(0)}), state)


def test_arrays_may_be_donated_or_changed_at_once(tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    host = np.arange(250_000.0)
    with checkpoint.open_manager(tmp_path / "c") as manager:
        state = {"a": jnp.arange(500_000.0), "host": host.copy()}
        checkpoint.save(manager, 1, state)
        spoil(state["a"]).block_until_ready()
        state["host"][:] = 0
    again = checkpoint.restore(tmp_path / "c", {"a": np.zeros(500_000, np.float32), "host": host})
    assert np.array_equal(again["a"], np.arange(500_000.0)) and np.array_equal(again["host"], host)


# layouts

LAYOUTS = {
    "numpy": None,
    "one": ((1,), ("a",), P()),
    "fsdp": ((8,), ("a",), P(None, "a")),
    "both": ((4, 2), ("a", "b"), P("a", "b")),
    "replicated": ((2, 4), ("a", "b"), P()),
    "mixed": ((2, 2), ("a", "b"), P(("a", "b"))),
}


def laid(layout, x):
    if layout is None:
        return x
    shape, axes, spec = layout
    mesh = jax.make_mesh(shape, axes, devices=jax.devices()[-int(np.prod(shape)) :])
    return jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 else P()))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "shards"])
def test_any_layout_restores_onto_any_other(tmp_path, whole, monkeypatch):
    if not whole:  # as where no process holds an array whole: Orbax writes the shards, without a checksum
        shards = lambda named: {name: x if x.ndim else np.asarray(x) for name, x in named.items()}
        monkeypatch.setattr(writing, "fetched", shards)
    values = {"x": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32), "n": np.array(3, np.int32)}
    for source, written in LAYOUTS.items():
        checkpoint.save(tmp_path / source, 1, {n: laid(written, v) for n, v in values.items()})
        for wanted in LAYOUTS.values():
            like = {n: laid(wanted, np.zeros_like(v)) for n, v in values.items()}
            if wanted is not None:
                like = {**like, "x": jax.ShapeDtypeStruct((8, 16), np.float32, sharding=like["x"].sharding)}
            again = checkpoint.restore(tmp_path / source, like)
            assert_same(again, values)
            assert (
                all(type(again[n]) is np.ndarray for n in again)
                if wanted is None
                else all(again[n].sharding == like[n].sharding for n in again)
            )


def test_random_keys_on_a_mesh(tmp_path):
    keys = jax.random.split(jax.random.key(4), 8)
    mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4])
    spread = jax.device_put(keys, NamedSharding(mesh, P("a")))
    checkpoint.save(tmp_path / "c", 1, {"keys": spread})
    for like in (spread, jax.device_put(keys, jax.devices()[3]), jax.ShapeDtypeStruct((8,), keys.dtype)):
        again = checkpoint.restore(tmp_path / "c", {"keys": like})["keys"]
        assert_same({"keys": again}, {"keys": keys})
        assert like.sharding is None or again.sharding == like.sharding
    with pytest.raises(InputError, match=r"keys is key<fry> there and key<rbg> here"):
        checkpoint.restore(tmp_path / "c", {"keys": jax.random.split(jax.random.key(4, impl="rbg"), 8)})


# which are kept


def test_the_newest_and_the_best_are_kept_and_a_step_is_saved_once(tmp_path):
    best = SimpleNamespace(step=None)
    with checkpoint.open_manager(tmp_path / "c", keep=2, best=lambda: best.step) as manager:
        for step, best.step in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2)):
            checkpoint.save(manager, step, {"step": np.int32(step)}, metadata={"twice": step})
        checkpoint.wait(manager)
        assert checkpoint.steps(manager) == [2, 4, 5] == sorted(manager.all_steps())
        best.step = 4
        with pytest.raises(InputError, match="holds step 5 already: save it as another step, or elsewhere"):
            checkpoint.save(manager, 5, {"step": np.int32(99)})
        checkpoint.save(manager, 6, {"step": np.int32(6)})
        assert checkpoint.restore(manager, {"step": np.int32(0)})["step"] == 6  # it waits for what is under way
        assert checkpoint.steps(tmp_path / "c") == [4, 5, 6] and checkpoint.latest(manager) == 6
        assert checkpoint.restore(manager, {"step": np.int32(0)}, step=5)["step"] == 5
        with pytest.raises(InputError, match="holds step 6, later than 3: remove it or save elsewhere"):
            checkpoint.save(manager, 3, {"step": np.int32(3)})


def test_one_of_the_last_is_enough(tmp_path):
    with checkpoint.open_manager(tmp_path / "c", keep=1) as manager:
        for step in range(1, 4):
            checkpoint.save(manager, step, {"a": np.ones(3)})
    assert checkpoint.steps(tmp_path / "c") == [3]


# what does not fit


def test_nothing_there(tmp_path):
    for place in (tmp_path / "absent", tmp_path):
        assert checkpoint.latest(place) is None and checkpoint.steps(place) == []
        for act in (lambda place: checkpoint.restore(place, zoo()), checkpoint.read_metadata):
            with pytest.raises(InputError, match="holds no complete checkpoint"):
                act(place)
    assert not (tmp_path / "absent").exists()
    (tmp_path / "file").write_text("x")
    inside = lambda place: checkpoint.save(place / "c", 1, {"a": np.ones(2)})
    for act in (checkpoint.open_manager, checkpoint.latest, inside):
        with pytest.raises(InputError, match="Not a directory"):
            act(tmp_path / "file")
    checkpoint.save(tmp_path / "c", 5, {"a": np.ones(2)})
    with pytest.raises(InputError, match="holds no step 4, but 5"):
        checkpoint.restore(tmp_path / "c", {"a": np.ones(2)}, step=4)


def test_another_state_is_refused_with_names_and_shapes(tmp_path):
    checkpoint.save(tmp_path / "c", 1, make_state())
    with pytest.raises(InputError) as error:
        checkpoint.restore(
            tmp_path / "c", make_state(LoraSpec(layers_to_transform=(0, 2), rank=4)), accept_changes=True
        )
    there = "adapters.model.layers.self_attn.q_proj.lora_a is (3, 16, 8) there and (3, 16, 4) here"
    assert there in one_line(error) and "and 7 more; go on with what it was saved with" in str(error.value)
    state = {"a": np.ones((2, 3)), "b": [np.ones(2)], "c": np.ones(1)}
    checkpoint.save(tmp_path / "d", 1, state)
    for other, clause in {
        "a is (2, 3) there and (3, 2) here": {**state, "a": np.ones((3, 2))},
        "a is float64 there and float32 here": {**state, "a": np.ones((2, 3), np.float32)},
        "a is float64 (2, 3) there and int8 (6,) here": {**state, "a": np.ones(6, np.int8)},
        "c is float64 (1,) there and absent here": {k: v for k, v in state.items() if k != "c"},
        "b.1 is absent there and float64 (4,) here": {**state, "b": [np.ones(2), np.ones(4)]},
    }.items():
        with pytest.raises(InputError) as error:
            checkpoint.restore(tmp_path / "d", clause)
        assert f"d/1 does not fit: {other}; " in one_line(error)


def test_another_run_is_refused_with_both_values(tmp_path):
    state, metadata = (
        {"a": np.ones(2)},
        {"lora": {"rank": 8, "alpha": 16.0, "target": ("q", "v")}, "base": {"w": "f32 1"}},
    )
    checkpoint.save(tmp_path / "c", 1, state, metadata={**metadata, "data": {"row": 7}, "nan": float("nan")})
    stored = checkpoint.read_metadata(tmp_path / "c", 1)
    assert stored["data"] == {"row": 7} and stored["lora"]["target"] == ["q", "v"] and stored["nan"] != stored["nan"]
    for same in (metadata, stored, {"lora": {**metadata["lora"], "alpha": 16}}, {}, None):
        assert_same(checkpoint.restore(tmp_path / "c", state, metadata=same), state)
    other = {"lora": {"rank": 16, "alpha": 16.0, "target": ["q"]}, "base": {"w": "f32 2"}, "seed": 3}
    with pytest.raises(InputError) as error:
        checkpoint.restore(tmp_path / "c", state, metadata=other)
    clauses = 'lora.rank is 8 there and 16 here, lora.target is ["q", "v"] there and ["q"] here, '
    clauses += 'base.w is "f32 1" there and "f32 2" here, seed is absent there and 3 here; go on with'
    assert f"c/1 is of another run: {clauses}" in one_line(error)
    assert_same(checkpoint.restore(tmp_path / "c", state, metadata=other, accept_changes=True), state)
    with pytest.raises(InputError, match="k4 is absent there and 4 here and 3 more; "):
        checkpoint.restore(tmp_path / "c", state, metadata={f"k{i}": i for i in range(8)})


@pytest.mark.parametrize(
    "state, metadata, message",
    [
        ({"a": np.ones(2), "name": "adam"}, None, "name of the state is no array"),
        ({"a.b": np.ones(2), "a": {"b": np.ones(2)}}, None, "two leaves of the state are called a.b"),
        (np.ones(2), None, "a state is a tree"),
        ({}, None, "a state is a tree"),
        ({"a": np.ones(2)}, {"x": np.ones(2)}, "metadata cannot be written as JSON"),
    ],
)
def test_what_cannot_be_saved(tmp_path, state, metadata, message):
    with pytest.raises(InputError, match=message):
        checkpoint.save(tmp_path / "c", 1, state, metadata=metadata)
    assert checkpoint.steps(tmp_path / "c") == []


# damage


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints 20 and 40."""
    place = tmp_path_factory.mktemp("two")
    with checkpoint.open_manager(place) as manager:
        for step in (20, 40):
            checkpoint.save(manager, step, zoo(step), metadata={"lora": {"rank": 8}})
    return place


def flip(raw, at):
    return raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :]


FILE = {
    "removed": None,
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "garbage": lambda raw: random.Random(0).randbytes(len(raw)),
    "longer": lambda raw: raw + b"\0",
    "flipped first": lambda raw: flip(raw, 0),
    "flipped middle": lambda raw: flip(raw, len(raw) // 2),
    "flipped last": lambda raw: flip(raw, len(raw) - 1),
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", FILE)
def test_a_damaged_file_is_noticed_or_harmless(two, tmp_path, kind, capfd, caplog):
    """Each file of a checkpoint in turn: the state comes back to the bit, or one line says what to do."""
    noticed = []
    for file in sorted(f.relative_to(two) for f in (two / "40").rglob("*") if f.is_file()):
        place = shutil.copytree(two, tmp_path / "c", dirs_exist_ok=True)
        damaged = FILE[kind] and FILE[kind]((place / file).read_bytes())
        (place / file).unlink() if damaged is None else (place / file).write_bytes(damaged)
        try:
            assert_same(checkpoint.restore(place, zoo(), metadata={"lora": {"rank": 8}}), zoo(40))
        except InputError as error:
            assert f"{place}/40 cannot be read (" in str(error) and "\n" not in str(error)
            assert str(error).endswith(f": remove {place}/40 to go on from step 20") and len(str(error)) < 500
            noticed.append(file.parts[1])
        shutil.rmtree(place)
    assert kind == "longer" or set(noticed) == {"about", "state"}
    assert capfd.readouterr().err == "" and caplog.records == []


DIRECTORY = {
    "empty directory": lambda at: (shutil.rmtree(at), at.mkdir()),
    "no state": lambda at: shutil.rmtree(at / "state"),
    "no about": lambda at: shutil.rmtree(at / "about"),
    "empty state": lambda at: (shutil.rmtree(at / "state"), (at / "state").mkdir()),
    "no data": lambda at: shutil.rmtree(at / "state" / "ocdbt.process_0"),
    "JSON of another kind": lambda at: (at / "about" / "metadata").write_text("[1, 2]"),
    "about edited": lambda at: edit(at / "about" / "metadata", lambda raw: raw["about"]["lora"].update(rank=16)),
    "checksum edited": lambda at: edit(at / "about" / "metadata", lambda raw: raw["leaves"]["wide"].__setitem__(2, 1)),
}


def edit(file, change):
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize("kind", DIRECTORY)
def test_a_damaged_directory_is_noticed(two, tmp_path, kind):
    place = shutil.copytree(two, tmp_path / "c")
    DIRECTORY[kind](place / "40")
    before = sorted(f for f in place.rglob("*"))
    with pytest.raises(InputError) as error:
        checkpoint.restore(place, zoo())
    assert one_line(error).endswith(f"): remove {place}/40 to go on from step 20")
    assert sorted(f for f in place.rglob("*")) == before  # nothing is removed
    with checkpoint.open_manager(place) as manager:
        assert_same(checkpoint.restore(manager, zoo(), step=20), zoo(20))
    shutil.rmtree(place / "40")
    assert_same(checkpoint.restore(place, zoo()), zoo(20))
    (place / "20" / "about" / "metadata").unlink()
    with pytest.raises(InputError, match="about/metadata is missing.*: remove .*/c/20 to begin anew"):
        checkpoint.restore(place, zoo())


def test_orbax_alone_reads_the_state_and_its_own_checkpoints_are_told_apart(two, tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(two, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        found = manager.restore(40, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    assert np.array_equal(found["wide"], zoo(40)["wide"]) and found["node"]["count"] == 40
    with ocp.CheckpointManager(tmp_path / "c") as manager:
        manager.save(1, args=ocp.args.StandardSave({"a": np.ones(3)}))
    with pytest.raises(InputError, match="c/1 was not written by stablelora_jax.training.checkpoint"):
        checkpoint.restore(tmp_path / "c", {"a": np.ones(3)})


# what is none of ours


def everything(root):
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in sorted(root.rglob("*"))}


FOREIGN = {  # what a user has in the directory -> the name in the message
    "years": ({"2021/photo.jpg", "2022/photo.jpg", "2023/photo.jpg"}, "2021"),
    "a step of ours by name": ({"1/photo.jpg"}, "1"),
    "parts and more": ({"7/about/other", "7/photo.jpg"}, "7"),
    "a temporary name": ({"7.orbax-checkpoint-tmp/x"}, "7.orbax-checkpoint-tmp"),
    "another temporary name": ({"7.orbax-checkpoint-tmp-123/x"}, "7.orbax-checkpoint-tmp-123"),
}
BESIDE = {"notes.txt", "0008/x", "³/x", "٣/x", "photos/2021/x", "5", "8.orbax-checkpoint-tmpfoo.txt"}


def put(root, files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("a user's")


@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_with_somebody_elses_is_refused_by_name(tmp_path, name):
    files, named = FOREIGN[name]
    put(tmp_path, files)
    before = everything(tmp_path)
    assert checkpoint.latest(tmp_path) is None and checkpoint.steps(tmp_path) == []
    for act in (
        lambda: checkpoint.save(tmp_path, 3000, {"a": np.ones(3)}),
        lambda: checkpoint.open_manager(tmp_path, keep=1),
    ):
        with pytest.raises(
            InputError, match=f"{tmp_path}/{named} is no checkpoint of stablelora_jax: move it"
        ) as error:
            act()
        assert "remove" not in str(error.value)
    with pytest.raises(InputError) as error:
        checkpoint.restore(tmp_path, {"a": np.ones(3)})
    assert "remove" not in str(error.value) and everything(tmp_path) == before


def test_what_lies_beside_checkpoints_stays(tmp_path):
    put(tmp_path, BESIDE)
    (tmp_path / "link").symlink_to("photos")
    before = everything(tmp_path)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, step, {"a": np.ones(3)})
            put(tmp_path, {"2019/later.jpg"})  # while the manager is open
        with pytest.raises(InputError, match="5 is there already: move it, or save elsewhere"):
            checkpoint.save(manager, 5, {"a": np.ones(3)})
    assert checkpoint.steps(tmp_path) == [3]
    left = everything(tmp_path)
    assert before.items() <= left.items() and "2019/later.jpg" in left and "1" not in left
    with pytest.raises(InputError, match=f"{tmp_path}/2019 was not written by stablelora_jax.training.checkpoint"):
        checkpoint.restore(tmp_path, {"a": np.ones(3)}, step=2019)
    assert checkpoint.restore(tmp_path, {"a": np.ones(3)})["a"].sum() == 3


def test_a_link_is_none_of_ours(tmp_path):
    checkpoint.save(tmp_path / "c", 1, {"a": np.ones(3)})
    (tmp_path / "d").mkdir()
    (tmp_path / "d/1").symlink_to(tmp_path / "c/1")
    assert checkpoint.steps(tmp_path / "d") == []
    with pytest.raises(InputError, match="d/1 is no checkpoint of stablelora_jax"):
        checkpoint.open_manager(tmp_path / "d")


def test_a_directory_that_lost_its_record_is_reported_and_kept(tmp_path):
    (tmp_path / "300").mkdir()
    assert checkpoint.latest(tmp_path) is None
    for act in (lambda: checkpoint.restore(tmp_path, zoo()), lambda: checkpoint.require_undamaged(tmp_path)):
        with pytest.raises(InputError, match=f"about/metadata is missing.: remove {tmp_path}/300 to begin anew"):
            act()
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        for step in (301, 302):
            checkpoint.save(manager, step, {"a": np.ones(3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["300", "302"]
    checkpoint.require_undamaged(tmp_path)


@pytest.mark.parametrize("step", [-1, 1.5, True, np.True_, "1", None, 2**63, 2**70, [1], np.ones(2, int), jnp.bool_(1)])
def test_a_step_is_a_whole_number(tmp_path, step):
    for act in (lambda: checkpoint.save(tmp_path / "c", step, {"a": np.ones(3)}),):
        with pytest.raises(InputError, match="step must be a whole number from 0, not"):
            act()
    assert not (tmp_path / "c").exists()
    checkpoint.save(tmp_path / "c", np.int64(4), {"a": np.ones(3)})
    if step is not None:
        with pytest.raises(InputError, match="step must be a whole number from 0, not"):
            checkpoint.restore(tmp_path / "c", {"a": np.ones(3)}, step=step)
    assert checkpoint.restore(tmp_path / "c", {"a": np.ones(3)}, step=jnp.int32(4))["a"].sum() == 3


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "2", None])
def test_keep_is_a_whole_number(tmp_path, keep):
    with pytest.raises(InputError, match="keep must be a whole number from 1, not"):
        checkpoint.open_manager(tmp_path / "c", keep=keep)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("where", ["", "a\0b", "x" * 300, 5, None, b"x", "~nobody-of-that-name"])
def test_a_directory_is_a_path(where):
    for act in (checkpoint.open_manager, checkpoint.latest, lambda at: checkpoint.save(at, 1, {"a": np.ones(2)})):
        with pytest.raises(InputError, match="the directory of checkpoints") as error:
            act(where)
        assert "\n" not in str(error.value)


RECORDS = {  # with a checksum of their own that is right
    "about a list": lambda raw: raw.update(about=[1]),
    "about null": lambda raw: raw.update(about=None),
    "leaves a list": lambda raw: raw.update(leaves=[1]),
    "leaves null": lambda raw: raw.update(leaves=None),
    "a leaf null": lambda raw: raw["leaves"].update(dict.fromkeys(raw["leaves"])),
    "a leaf short": lambda raw: raw["leaves"].update({k: v[:1] for k, v in raw["leaves"].items()}),
    "a leaf long": lambda raw: raw["leaves"].update({k: [*v, 1] for k, v in raw["leaves"].items()}),
    "a shape of text": lambda raw: raw["leaves"].update({k: ["x", *v[1:]] for k, v in raw["leaves"].items()}),
    "a dtype of numbers": lambda raw: raw["leaves"].update({k: [v[0], 3, v[2]] for k, v in raw["leaves"].items()}),
    "a checksum of text": lambda raw: raw["leaves"].update({k: [*v[:2], "x"] for k, v in raw["leaves"].items()}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_wrong_kinds_is_damaged(two, tmp_path, name):
    place = shutil.copytree(two, tmp_path / "c")

    def change(raw):
        RECORDS[name](raw)
        raw["crc32"] = zlib.crc32(json.dumps([raw["about"], raw["leaves"]], sort_keys=True).encode())

    edit(place / "40" / "about" / "metadata", change)
    for act in (
        lambda: checkpoint.restore(place, zoo(), metadata={"lora": 1}),
        lambda: checkpoint.read_metadata(place),
    ):
        with pytest.raises(
            InputError, match=f"cannot be read .about/metadata is .*: remove {place}/40 to go on"
        ) as error:
            act()
        one_line(error)


# interruptions

KILLED = """
import os, signal, sys
import numpy as np
from stablelora_jax import checkpoint
manager = checkpoint.open_manager(sys.argv[1])
checkpoint.save(manager, 1, {"a": np.ones(9)})
checkpoint.wait(manager)
checkpoint.save(manager, 2, {"a": np.random.default_rng(0).normal(size=3_000_000)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_nothing_that_is_picked_up(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "c")], capture_output=True)
    assert done.returncode == -9 and len(list((tmp_path / "c").glob("2.*tmp*"))) == 1
    assert checkpoint.steps(tmp_path / "c") == [1]
    assert np.array_equal(checkpoint.restore(tmp_path / "c", {"a": np.zeros(9)})["a"], np.ones(9))
    with checkpoint.open_manager(tmp_path / "c") as manager:
        checkpoint.save(manager, 3, {"a": np.zeros(9)})
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "3"]


TROUBLE = """
import os, shutil, subprocess, sys
import numpy as np
from stablelora_jax import checkpoint
from stablelora_jax.utils.errors import InputError, RunError

rng = np.random.default_rng(0)
place, small = sys.argv[1] + "/c", {f"a{i}": rng.normal(size=300) for i in range(30)}
large = {f"a{i}": rng.normal(size=10_000) for i in range(30)}  # many leaves: one fails while others are written

def refused(act, kind=RunError):
    try:
        act()
    except kind as error:
        print(error)
        assert not [name for name in os.listdir(place) if "tmp" in name]  # it gives the space back
        restored = checkpoint.restore(place, small)
        assert "\\n" not in str(error) and all(np.array_equal(restored[name], small[name]) for name in small)
        return
    raise SystemExit("not refused")

manager = checkpoint.open_manager(place)
checkpoint.save(manager, 1, small)
checkpoint.save(manager, 2, large)
refused(lambda: checkpoint.save(manager, 3, small))
checkpoint.save(manager, 2, large)
refused(lambda: checkpoint.wait(manager))
checkpoint.save(manager, 2, large)
refused(manager.close)
refused(lambda: checkpoint.save(place, 2, large))
for free in range(0, 120_000, 10_000):
    with open(sys.argv[1] + "/filler", "wb") as filler:
        filler.write(bytes(max(0, shutil.disk_usage(place).free - free)))
    try:
        checkpoint.save(place, 4, small)
    except RunError as error:
        assert "No space left on device; step 1 is the newest" in str(error), error
    os.remove(filler.name)
checkpoint.save(place, 5, small)
assert sorted(os.listdir(place)) == [str(s) for s in checkpoint.steps(place)] and checkpoint.latest(place) == 5
manager = checkpoint.open_manager(place)
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
refused(lambda: (checkpoint.save(manager, 6, small), checkpoint.wait(manager)))
manager.close()
refused(lambda: checkpoint.open_manager(sys.argv[1] + "/d"), InputError)
subprocess.run(["mount", "-o", "remount,rw", sys.argv[1]], check=True)
os.rename(place, place + "2")
open(place, "w").close()
try:
    checkpoint.save(place, 7, small)
except InputError as error:
    print(error)
assert sys.unraisablehook is sys.__unraisablehook__
"""


def test_a_full_or_read_only_disk_ends_in_one_line_and_the_last_checkpoint_stays(tmp_path):
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    done = subprocess.run(
        [*mount, sys.executable, "-c", TROUBLE, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    full = f"cannot write checkpoint 2 in {tmp_path}/c: No space left on device; step 1 is the newest complete one"
    assert done.stdout.splitlines() == 4 * [full] + [
        f"cannot write checkpoint 6 in {tmp_path}/c: Read-only file system; step 5 is the newest complete one",
        f"cannot keep checkpoints in {tmp_path}/d: Read-only file system",
        f"cannot keep checkpoints in {tmp_path}/c: Not a directory",
    ]


def test_a_directory_that_disappears(tmp_path):
    manager = checkpoint.open_manager(tmp_path / "c")
    checkpoint.save(manager, 1, {"a": np.ones(3)})
    checkpoint.wait(manager)
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").write_text("")
    with pytest.raises(RunError, match="cannot write checkpoint 2 in .*/c: Not a directory; there is no other"):
        checkpoint.save(manager, 2, {"a": np.ones(3)})
    manager.close()


DAMAGED = """
import pathlib, sys
import numpy as np
from stablelora_jax import checkpoint
from stablelora_jax.utils.errors import InputError

place, state = pathlib.Path(sys.argv[1]), {f"a{i}": np.random.default_rng(i).normal(size=3000) for i in range(100)}
with checkpoint.open_manager(place) as manager:
    checkpoint.save(manager, 1, state)
for file in [p for p in (place / "1" / "state").rglob("d/*") if p.stat().st_size > 4000]:
    file.write_bytes(file.read_bytes()[:2000])  # some arrays can be read, others not
try:
    checkpoint.restore(place, state)
except InputError as error:
    print(error)
assert sys.unraisablehook is sys.__unraisablehook__
"""


def test_a_process_that_saves_and_fails_to_restore_prints_nothing_at_exit(tmp_path):
    done = subprocess.run([sys.executable, "-c", DAMAGED, str(tmp_path / "c")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(f"{tmp_path}/c/1 cannot be read (state: ") and len(done.stdout.splitlines()) == 1


# the loop of the README


def test_a_loop_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, params = tiny_decoder()
    spec, tx = LoraSpec(), stable_lora(1e-2)
    adapters = init_adapters(jax.random.key(0), params, spec)

    @jax.jit
    def train_step(state, params, number):
        grads = jax.tree.map(lambda x: x + 0.1 + number, state["adapters"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["adapters"])
        return {"adapters": optax.apply_updates(state["adapters"], updates), "opt_state": opt_state}

    def train(until):
        state = {"adapters": adapters, "opt_state": tx.init(adapters)}
        metadata = {"lora": asdict(spec), "base": fingerprint(params)}
        with checkpoint.open_manager("checkpoints", keep=2) as manager:
            first = checkpoint.latest(manager) or 0
            if first:
                state = checkpoint.restore(manager, state, metadata=metadata)
            for number in range(first, until):
                state = train_step(state, params, number)
                if (number + 1) % 2 == 0:
                    checkpoint.save(manager, number + 1, state, metadata)
        return state

    whole = train(8)
    assert checkpoint.steps("checkpoints") == [6, 8]
    shutil.rmtree("checkpoints")
    train(5)
    assert_same(train(8), whole)
    params["model"]["norm"]["weight" if "weight" in params["model"]["norm"] else "scale"] += 1
    with pytest.raises(InputError, match=r"checkpoints/8 is of another run: base.model.norm.\w+ is \"float32\[16\] "):
        train(9)


def test_the_readmes_example_of_orbax_alone(tmp_path):
    import orbax.checkpoint as ocp

    state = {"adapters": make_state().adapters, "opt_state": make_state().opt_state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "checkpoint", state), state)
