"""Paths in nested dicts."""

import numpy as np

from stablelora_jax.utils import tree


def test_set_in_copies_only_the_way():
    before = {"a": {"b": 1}, "c": {"d": 2}}
    after = tree.set_in(before, ("a", "x", "y"), 3)
    assert before == {"a": {"b": 1}, "c": {"d": 2}} and after["a"] == {"b": 1, "x": {"y": 3}}
    assert after["c"] is before["c"] and tree.get_in(after, ("a", "x", "y")) == 3
    assert tree.get_in(after, ("a", "nothing", "y")) is None


def test_find_dicts_is_sorted_and_stops_at_a_find():
    found = tree.find_dicts({"b": {"k": np.ones(2), "in": {"k": 1}}, "a": {"k": 2}}, lambda node: "k" in node)
    assert list(found) == [("a",), ("b",)]
