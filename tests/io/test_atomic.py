"""A file or folder has its former content or its new one, never a part."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir, atomic_file, check_writable, clean_stale_temps, recover_interrupted


def write(target: Path, text: str, overwrite: bool = False) -> None:
    with atomic_dir(target, overwrite) as folder:
        (folder / "file").write_text(text)


# Writes a folder and a file beside it, says so, and goes on until it is killed.
WRITER = """
import pathlib, sys, time
from fm9g.io.atomic import atomic_file, atomic_dir
target = pathlib.Path(sys.argv[1])
with atomic_dir(target, overwrite=True) as folder, atomic_file(target.with_name("b")) as file:
    (folder / "file").write_text("half")
    file.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(target: Path, *prefix: str) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", WRITER, str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_folder_appears_when_the_block_is_done(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_an_error_in_the_block_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "a", overwrite=True) as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "x"


def test_what_a_killed_process_left_is_put_right(tmp_path: Path) -> None:
    """Killed between the two renames, and killed while it wrote."""
    (tmp_path / ".a.7.old").mkdir()
    (tmp_path / ".a.7.old" / "file").write_text("old")
    (tmp_path / ".a.7.tmp").mkdir()
    (tmp_path / ".a.mine.tmp").mkdir()
    (tmp_path / ".a.8.new").mkdir()  # is about to be locked
    (tmp_path / ".a.9.new").mkdir()
    os.utime(tmp_path / ".a.9.new", (0, 0))
    recover_interrupted(tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == [".a.8.new", ".a.mine.tmp", "a"]


@pytest.mark.parametrize("container", [False, True])
def test_what_another_process_writes_is_left_alone_until_it_is_killed(tmp_path: Path, container: bool) -> None:
    """Also one whose number nobody here knows, as in another container on the same volume."""
    prefix = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"] if container else []
    if container and subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("unshare --pid does not work here")
    process = start_writer(tmp_path / "a", *prefix)
    try:
        there = sorted(os.listdir(tmp_path))
        assert len(there) == 2
        clean_stale_temps(tmp_path)
        recover_interrupted(tmp_path / "a")
        assert sorted(os.listdir(tmp_path)) == there
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while os.listdir(tmp_path) and time.monotonic() < deadline:  # the child of unshare ends after it
        clean_stale_temps(tmp_path)
    assert os.listdir(tmp_path) == []


def test_where_locks_do_not_work_nothing_is_swept_and_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    write(tmp_path / "a", "x")
    (tmp_path / ".a.7.tmp").mkdir()
    clean_stale_temps(tmp_path)
    assert (tmp_path / ".a.7.tmp").is_dir()
    assert f"{tmp_path / '.a.7.tmp'}: this file system has no locks" in caplog.text


def test_a_full_disk_is_told_whatever_class_it_comes_in(tmp_path: Path) -> None:
    for error in (OSError(28, "No space left on device"), RuntimeError("io: No space left on device")):
        with (
            pytest.raises(UserError, match="the disk is full; nothing was changed"),
            atomic_file(tmp_path / "f") as path,
        ):
            path.write_text("half")
            raise error
    with pytest.raises(RuntimeError, match="other"), atomic_file(tmp_path / "f"):
        raise RuntimeError("other")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file is in the way"):
        write(tmp_path / "file", "y", overwrite=True)
    with pytest.raises(UserError, match=r"file/sub/probe: cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "sub")
    check_writable(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with pytest.raises(UserError, match="something that is not a file is in the way"), atomic_file(tmp_path / "link"):
        raise AssertionError("not reached")
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_that_cannot_be_read_is_not_told_as_one_that_cannot_be_written(tmp_path: Path) -> None:
    for number, name in ((errno.EACCES, tmp_path / "source.jsonl"), (errno.EIO, tmp_path / "out2" / "x")):
        with (
            pytest.raises(UserError, match=rf"^{name}: cannot be read: {os.strerror(number)}"),
            atomic_dir(tmp_path / "out"),
        ):
            raise OSError(number, os.strerror(number), str(name))
    for name in (tmp_path / "out" / "x", tmp_path, tmp_path / ".out.12.tmp" / "x"):
        with (
            pytest.raises(UserError, match=rf"^{tmp_path / 'out'}: cannot be written: Input/output error"),
            atomic_dir(tmp_path / "out"),
        ):
            raise OSError(errno.EIO, "Input/output error", str(name))


def test_a_loop_of_links_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"loop: cannot be written"), atomic_dir(tmp_path / "loop"):
        pass
    with atomic_file(tmp_path / "loop") as temporary:
        temporary.write_bytes(b"a")
    assert (tmp_path / "loop").read_bytes() == b"a"


def test_what_a_killed_process_left_beside_a_file_goes_with_the_next_one(tmp_path: Path) -> None:
    for name in (".page.html.5.tmp", ".page.html.6.new"):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, 0))
    with atomic_file(tmp_path / "page.html") as temporary:
        temporary.write_text("whole")
    assert os.listdir(tmp_path) == ["page.html"]
