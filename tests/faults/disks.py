"""Small disks, and disks that another program fills and frees."""

from __future__ import annotations

import random
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory over a folder. options: size=BYTES, nr_inodes=NUMBER."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "fm9g-test", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    with tempfile.TemporaryDirectory() as folder, suppress(OSError, subprocess.CalledProcessError):
        with mounted(Path(folder), "size=64k"):
            return True
    return False


class Ballast:
    """A file that fills a disk and is deleted again, again and again, while `active`; a context manager."""

    def __init__(self, folder: Path, rng: random.Random, pause: tuple[float, float], chunk: int) -> None:
        """pause: seconds between two changes, from and to. chunk: bytes of a write; less than that may stay free."""
        self._file, self._rng, self._pause, self._chunk = folder / "ballast", rng, pause, chunk
        self.active, self._over = True, threading.Event()
        self._thread = threading.Thread(target=self._fill_and_free, daemon=True)

    def __enter__(self) -> Ballast:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _fill_and_free(self) -> None:
        rng = random.Random(self._rng.random())
        while not self._over.wait(rng.uniform(*self._pause)):
            if self.active:
                with suppress(OSError), self._file.open("wb", buffering=0) as file:
                    while file.write(bytes(self._chunk)):
                        pass
                self._over.wait(rng.uniform(*self._pause))
            self._file.unlink(missing_ok=True)
