"""Files that grow at their end."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from fm9g.errors import UserError
from fm9g.io.append import AppendWriter


@pytest.mark.parametrize("past_the_cache", [True, False])
def test_a_growing_file_has_every_byte_once(
    past_the_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(200_000))
    if not past_the_cache:
        opened = os.open

        def refused(path: Path, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opened(path, flags, mode)

        monkeypatch.setattr(os, "open", refused)
    for seed in range(30):
        pick = random.Random(seed)
        expected = bytearray(pick.randbytes(pick.choice((0, 1, 4096, 5000))))
        (tmp_path / "file").write_bytes(expected + b"what is cut off")
        file = AppendWriter(tmp_path / "file", len(expected), buffer_bytes=3 * 4096)
        for _ in range(pick.randint(0, 12)):
            start, length = pick.randrange(100_000), pick.choice((1, 3, 4096, 8192, pick.randrange(40_000)))
            part = source.read_bytes()[start : start + length]
            if pick.random() < 0.6:
                file.copy(source, start, length, in_kernel=pick.random() < 0.5)
            else:
                file.write(part)
            expected += part
        file.flush()
        assert file.position == len(expected)
        file.fdatasync()
        file.close()
        assert (tmp_path / "file").read_bytes() == expected, seed


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_source_that_became_shorter_is_reported(in_kernel: bool, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(5000))
    with AppendWriter(tmp_path / "file") as file, pytest.raises(UserError, match=r"source: .*became shorter"):
        file.copy(tmp_path / "source", 1000, 4001, in_kernel)


def test_a_block_that_fails_flushes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), AppendWriter(tmp_path / "file") as file:
        file.write(b"waits in the buffer")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_bytes() == b""
    with AppendWriter(tmp_path / "file") as file:
        file.write(b"all")
    assert (tmp_path / "file").read_bytes() == b"all"
