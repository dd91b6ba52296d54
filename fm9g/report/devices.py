"""On what a run was trained, session by session, and how the page speaks of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fm9g.report.files import Run

CPU = "CPU"  # as fm9g.train.device_flops.device_name calls it; any other name is that of a GPU
GPU, MIXED = "GPU", ""
_MEMORY_CAPTIONS = {
    GPU: "The most that a GPU held at a time. Near the GPU's size, a run may fail.",
    CPU: "The most that a process held at a time. Where all processes together come near the machine's memory, the "
    "system may end the run.",
    MIXED: "The most that a process held at a time, in the memory of a GPU or of the machine. Near its size, a run "
    "may fail.",
}
_MFU_CAPTIONS = {
    GPU: "Share of the arithmetic that the GPUs could do at best; 40 to 60 % is good for large models.",
    CPU: "Share of the arithmetic that the CPU could do at best, which is what peak_tflops says.",
    MIXED: "Share of the arithmetic that the devices could do at best; on GPUs, 40 to 60 % is good for large models.",
}


_MEMORY_NOTES = {
    GPU: "the most that a GPU held",
    CPU: "the most of the machine's memory that a process held",
    MIXED: "the most that a process held",
}


def memory_note(runs: list[Run]) -> str:
    return _MEMORY_NOTES[_device_kind(runs)]


def memory_caption(runs: list[Run]) -> str:
    return _MEMORY_CAPTIONS[_device_kind(runs)]


def mfu_caption(runs: list[Run]) -> str:
    return _MFU_CAPTIONS[_device_kind(runs)]


def describe_devices(run: Run) -> str:
    """The devices in words, those of each session where they changed; empty where they are not known."""
    said: list[str] = []
    for event in _start_events(run):
        words = _device_list(event["devices"])
        if not said:
            said.append(words)
        elif said[-1].rpartition(": ")[2] != words:
            said.append(f"from step {event['step']:,}: {words}")
    return "; ".join(said)


def _device_kind(runs: list[Run]) -> str:
    """CPU or GPU where all sessions of all runs had only these, else MIXED; also where a run does not tell."""
    kinds = set()
    for run in runs:
        names = {name for event in _start_events(run) for name in event["devices"]}
        kinds |= {CPU if name == CPU else GPU for name in names} or {MIXED}
    return kinds.pop() if len(kinds) == 1 else MIXED


def _start_events(run: Run) -> Iterable[dict[str, Any]]:
    """The events that began a session and tell its devices: their names, and how many processes had such a one."""
    for event in run.events:
        devices = event.get("devices")
        if isinstance(devices, dict) and devices and all(isinstance(count, int) for count in devices.values()):
            yield event


def _device_list(devices: dict[str, int]) -> str:
    parts = []
    for name, count in devices.items():
        if name == CPU:
            parts.append(f"CPU, {count} processes" if count > 1 else "CPU")
        else:
            parts.append(f"{count} x {name}")
    return " and ".join(parts)
