"""Files are replaced whole or stay as they were, and mistakes in them are one line."""

import pytest

from stablelora_jax.utils.errors import InputError, RunError
from stablelora_jax.utils.files import read_json_object, write_parts_whole, write_whole, writing


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    write_whole(tmp_path / "x", "old")

    def parts():
        yield b"ne"
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError) as error, writing(tmp_path / "x"):
        write_parts_whole(tmp_path / "x", parts())
    reason = "No space left on device; once that is mended, the same command goes on"
    assert str(error.value) == f"cannot write {tmp_path / 'x'}: {reason}"
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "is not readable JSON: No such file or directory"),
        (b"", "is not readable JSON: Expecting value"),
        (b'{"a": 1', "is not readable JSON: Expecting"),
        (b"\xff\xfe\x00", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"[1]", "must hold a JSON object, not list"),
        (b"null", "must hold a JSON object, not NoneType"),
    ],
)
def test_json_that_is_no_object_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_json_object(tmp_path / "s.json")
    assert str(error.value).startswith(str(tmp_path / "s.json")) and "\n" not in str(error.value)


def test_json(tmp_path):
    write_whole(tmp_path / "s.json", '{"ü": [1.5]}')
    assert read_json_object(tmp_path / "s.json") == {"ü": [1.5]}
