"""A run that is killed again and again ends with the very bits of one that was not; the long form is the script's."""

import pytest

from tests.runs.kill_and_resume import check


@pytest.mark.long
@pytest.mark.parametrize("optimizer,kills", [("stable_lora", 2), pytest.param("lora_rite", 2, marks=pytest.mark.soak)])
def test_short(optimizer, kills, tmp_path):
    assert sum(check(optimizer, kills, 20, 1, tmp_path).values()) == kills


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["stable_lora", "lora_rite"])
def test_twenty_kills(optimizer, tmp_path):
    assert sum(check(optimizer, 20, 60, 0, tmp_path).values()) == 20
