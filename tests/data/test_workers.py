"""Pools of processes end when they are told to, whatever their workers are at."""

from __future__ import annotations

import subprocess
import sys

# Results are larger than a pipe holds, so that workers are killed in the middle of one.
SCRIPT = """
from fm9g.data.workers import start_workers, stop_workers

def large(size):
    return b"x" * size

if __name__ == "__main__":
    for _ in range(3):
        pool = start_workers(2)
        results = [pool.submit(large, 4 << 20) for _ in range(8)]
        results[0].result()
        stop_workers(pool)
    print("stopped")
"""


def test_a_process_ends_after_its_workers_were_killed_in_the_middle_of_a_result(tmp_path) -> None:
    script = tmp_path / "script.py"  # a file: workers import it
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")
