"""A worker for tests: `worker.py KIND FOLDER`. It writes its process id into the folder."""

import os
import sys
import time
from pathlib import Path

from fm9g.errors import UserError
from fm9g.launch.consistency import check_same
from fm9g.launch.dist_env import read_dist_env
from fm9g.launch.watchdog import Watchdog
from fm9g.train.signals import SignalHandler


def main(kind: str, folder: Path) -> int:
    rank_info = read_dist_env()
    (folder / f"pid-{rank_info.rank}-{rank_info.attempt}").write_text(str(os.getpid()))
    if kind == "exit" and rank_info.rank == 1:
        print("the last words", file=sys.stderr)
        return 3
    with Watchdog(rank_info, folder) as watchdog, SignalHandler() as signal_handler:
        (folder / f"ready-{rank_info.rank}-{rank_info.attempt}").touch()
        if kind == "error" and rank_info.rank == 1:
            raise UserError("data.jsonl:7: found nothing, expected something")
        if kind == "bug" and rank_info.rank == 1:
            raise KeyError("a bug")
        if kind == "echo" and rank_info.rank == 0:  # as a collective operation fails that rank 1 has left
            while not (folder / "killed").exists():
                time.sleep(0.02)
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
        if kind == "differ":
            check_same([{"data": {"hash": "aa"}}, {"data": {"hash": "bb"}}], ["left", "right"])
        if kind == "late" and rank_info.rank == 1:
            time.sleep(1.5)
        steps = 10**9 if kind in ("train", "hang", "echo") else 4
        for step in range(steps):
            watchdog.report_progress(step)
            if kind == "crash-once" and (rank_info.rank, rank_info.attempt, step) == (1, 0, 2):
                os.kill(os.getpid(), 9)
            if kind == "hang" and rank_info.rank == 1 and step == 3:
                hang_here()
            while kind == "hang" and rank_info.rank == 0 and step == 3:
                time.sleep(0.1)
            if signal_handler.stop_requested:
                (folder / f"saved-{rank_info.rank}").touch()
                return 130
            time.sleep(0.02)
    resumes = rank_info.attempt > 0 and rank_info.start_time > 1e9
    print(f"rank {rank_info.rank} done, attempt {rank_info.attempt}, resumes: {resumes}")
    return 0


def hang_here() -> None:
    time.sleep(1000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
