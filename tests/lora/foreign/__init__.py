"""Models that are not ours: the laws that adapters obey on any of them."""

import pytest

pytest.register_assert_rewrite("tests.lora.foreign.laws")
