"""A worker of the tests: what it does is its first argument; it leaves its process id in the folder of the second."""

import os
import sys
import time
from pathlib import Path

from fm9g.errors import UserError
from fm9g.launch.agree import check_same
from fm9g.launch.monitor import Monitor
from fm9g.launch.place import find_place
from fm9g.train.interrupt import Interrupt


def main(kind: str, folder: Path) -> int:
    place = find_place()
    (folder / f"pid-{place.rank}-{place.attempt}").write_text(str(os.getpid()))
    if kind == "exit" and place.rank == 1:
        print("the last words", file=sys.stderr)
        return 3
    with Monitor(place, folder) as monitor, Interrupt() as interrupt:
        (folder / f"ready-{place.rank}-{place.attempt}").touch()
        if kind == "error" and place.rank == 1:
            raise UserError("data.jsonl:7: found nothing, expected something")
        if kind == "bug" and place.rank == 1:
            raise KeyError("a bug")
        if kind == "echo" and place.rank == 0:  # as a collective operation fails that rank 1 has left
            while not (folder / "killed").exists():
                time.sleep(0.02)
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
        if kind == "differ":
            check_same([{"data": {"hash": "aa"}}, {"data": {"hash": "bb"}}], ["left", "right"])
        if kind == "late" and place.rank == 1:
            time.sleep(1.5)
        steps = 10**9 if kind in ("train", "hang", "echo") else 4
        for step in range(steps):
            monitor.progress(step)
            if kind == "crash-once" and (place.rank, place.attempt, step) == (1, 0, 2):
                os.kill(os.getpid(), 9)
            if kind == "hang" and place.rank == 1 and step == 3:
                hang_here()
            while kind == "hang" and place.rank == 0 and step == 3:
                time.sleep(0.1)
            if interrupt.requested:
                (folder / f"saved-{place.rank}").touch()
                return 130
            time.sleep(0.02)
    print(f"rank {place.rank} done, attempt {place.attempt}, resumes: {place.attempt > 0 and place.started > 1e9}")
    return 0


def hang_here() -> None:
    time.sleep(1000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
