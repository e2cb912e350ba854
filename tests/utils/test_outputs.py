"""What ``--output`` may do: make something new, write into a pipe or a device that is there, and replace nothing."""

import os
import stat
import sys
import threading

import pytest

from stablelora_jax.utils import outputs
from stablelora_jax.utils.errors import InputError, RunError
from stablelora_jax.utils.files import as_path, put_new, write_new, write_whole
from stablelora_jax.utils.outputs import new_directory, new_file, open_output, require_new


def snapshot(root):
    """Every entry below ``root``: its kind, and the target of a link or the content of a file."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = os.lstat(path).st_mode
        content = os.readlink(path) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else None
        found[str(path.relative_to(root))] = (stat.S_IFMT(mode), content)
    return found


@pytest.fixture
def there(tmp_path):
    """Things of a user's, of every kind that can be made here."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "inside").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "link to a directory").symlink_to("directory")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


NAMES = ("file", "directory", "empty", "link", "link to a directory", "dangling", "loop")
WAYS = {"file": new_file, "directory": new_directory, "stream": open_output}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_there_is_refused_before_the_work(there, way, name):
    before = snapshot(there)
    with pytest.raises(InputError, match="exists already|symbolic links") as caught, WAYS[way](there / name):
        pytest.fail("the work has begun")
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert snapshot(there) == before


@pytest.mark.parametrize(
    "name", ["file/below", "dangling/below", "x" * 300, "a\0b", "\ud800", "~nobody-of-that-name/x", ""]
)
@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_made_is_refused_before_the_work(there, way, name):
    before = snapshot(there)
    path = name if name.startswith("~") or not name else f"{there}/{name}"
    with pytest.raises(InputError) as caught, WAYS[way](path):
        pytest.fail("the work has begun")
    assert "\n" not in str(caught.value) and snapshot(there) == before


def fill(way, made):
    if way == "directory":
        (made / "x").write_text("new")
    elif way == "file":
        made.write_text("new")
    else:
        made.write("new")


@pytest.mark.parametrize("way", WAYS)
def test_it_is_there_at_the_end_or_not_at_all(tmp_path, way):
    out = tmp_path / "not" / "yet" / "out"
    with pytest.raises(ZeroDivisionError), WAYS[way](out) as made:
        fill(way, made)
        assert not out.exists()
        raise ZeroDivisionError
    assert snapshot(tmp_path) == {}, "nor are the directories above it"
    with WAYS[way](out) as made:
        fill(way, made)
    assert (out / "x" if way == "directory" else out).read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) & 0o044, "as readable as any other file"


@pytest.mark.parametrize("way", WAYS)
def test_of_two_at_once_the_second_is_refused_and_the_first_stays(tmp_path, way):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="exists already"), WAYS[way](out) as late:
        fill(way, late)
        with WAYS[way](out) as early:
            fill(way, early)
        before = snapshot(tmp_path / "out" if way == "directory" else tmp_path)["x" if way == "directory" else "out"]
    assert snapshot(tmp_path)["out/x" if way == "directory" else "out"] == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    write_new(tmp_path / "x", b"1")
    with pytest.raises(InputError, match="exists already"):
        write_new(tmp_path / "x", b"2")
    assert snapshot(tmp_path) == {"x": (stat.S_IFREG, b"1")}


@pytest.mark.parametrize("name", ["link", "dangling", "directory", "pipe"])
def test_only_a_regular_file_is_replaced(there, name):
    os.mkfifo(there / "pipe")
    before = snapshot(there)
    with pytest.raises(InputError, match="is not replaced"):
        write_whole(there / name, "new")
    assert snapshot(there) == before


def test_a_directory_is_put_where_nothing_is(there):
    (there / "new").mkdir()
    before = snapshot(there)
    for name in ("directory", "file", "link to a directory", "dangling"):
        with pytest.raises(InputError, match="exists already"):
            put_new(there / "new", there / name)
    assert snapshot(there) == before


@pytest.mark.parametrize("through", ["pipe", "link to the pipe"])
def test_a_pipe_is_written_into(tmp_path, through):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to the pipe").symlink_to("pipe")
    said = []
    reader = threading.Thread(target=lambda: said.append((tmp_path / "pipe").read_text()))
    reader.start()
    with open_output(tmp_path / through) as stream:
        stream.write("ü\n")
    reader.join()
    assert said == ["ü\n"] and stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)


def test_a_pipe_that_nobody_reads_from_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: nobody reads from it"), open_output(tmp_path / "pipe"):
        pytest.fail("the work has begun")


def test_a_reader_that_goes_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threads = [threading.Thread(target=lambda: (tmp_path / "pipe").open("rb").close())]
    threads[0].start()
    with pytest.raises(RunError, match="its reader has gone"), open_output(tmp_path / "pipe") as stream:
        threads[0].join()
        stream.write("x" * 2**20)


def test_a_device_is_written_into(tmp_path):
    node = tmp_path / "null"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        node.open("wb").close()
    except OSError:
        pytest.skip("no device can be made here")
    with open_output(node) as stream:
        stream.write("x")
    assert stat.S_ISCHR(os.lstat(node).st_mode)
    block = tmp_path / "block"
    os.mknod(block, 0o600 | stat.S_IFBLK, os.makedev(259, 4095))
    with pytest.raises(InputError, match="as a block device"), open_output(block):
        pytest.fail("a disk is no place for a file")


def test_the_standard_output_is_written_to_as_such(tmp_path, monkeypatch):
    with (tmp_path / "out.txt").open("w") as file:
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        monkeypatch.setattr(sys, "stdout", file)
        try:
            for path in ("/proc/self/fd/1", str(tmp_path / "out.txt")):
                with open_output(path) as stream:
                    assert stream is file
                    stream.write("x\n")
        finally:
            os.dup2(saved, 1)
            os.close(saved)
    assert (tmp_path / "out.txt").read_text() == "x\nx\n"


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/x") == tmp_path / "x" and require_new("~/x") == tmp_path / "x"
    assert as_path(tmp_path / "~") == tmp_path / "~", "in the middle it is a name"


@pytest.mark.parametrize("value", [None, 5, True, b"x", [], {}, ("a",)])
def test_what_is_no_path_is_named(value):
    with pytest.raises(InputError, match="--output must be a string or a path, not"):
        as_path(value, "--output")
