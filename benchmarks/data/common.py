"""Shared by the data benchmarks: real records, measurement of a command, tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

SHARED = Path(__file__).resolve().parents[3] / "shared"


class Measured(NamedTuple):
    """A command's wall-clock seconds, and the maximum of its processes' memory together, shared pages counted once."""

    seconds: float
    memory_bytes: int


def records_of(*names: str) -> list[bytes]:
    """Lines of jsonl, {"input", "output"}, from files of the shared data folder."""
    lines = []
    for name in names:
        text = (SHARED / "data" / name).read_text(encoding="utf-8")
        if name.endswith(".txt"):
            records = [{"input": "", "output": line} for line in text.splitlines() if line.strip()]
        else:
            records = [
                {"input": r["instruction"] + r.get("input", ""), "output": r["output"]} for r in json.loads(text)
            ]
        lines += [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
    return lines


def measured(command: str | list[str]) -> Measured:
    """Runs a command. Raises RuntimeError if it fails."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, shell=isinstance(command, str), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    max_memory = 0
    errors: list[bytes] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    while process.poll() is None:
        max_memory = max(max_memory, memory_of(process.pid))
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        raise RuntimeError(errors[0].decode())
    return Measured(time.monotonic() - started, max_memory)


def memory_of(process: int) -> int:
    """Bytes of a process and its descendants: the proportional set size, so that shared pages count once."""
    total = 0
    for pid in descendants(process):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # the process has just ended
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


def descendants(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return [process]
    return [process, *(pid for child in children for pid in descendants(int(child)))]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def report(title: str, text: str) -> None:
    print(f"### {title}\n\n{text}\n\n{os.cpu_count()} cores, Python {platform.python_version()}\n", flush=True)
