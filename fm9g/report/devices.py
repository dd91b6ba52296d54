"""The devices that a run was trained on, at each launch, and captions that depend on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fm9g.report.files import Run

CPU = "CPU"  # as training names it in its start event; any other name is that of a GPU
GPU, MIXED = "GPU", ""
_MEMORY_CAPTIONS = {
    GPU: "The maximum of a GPU. Near the GPU's size, a run may fail.",
    CPU: "The maximum of a process. If all processes together come near the machine's memory, the system may end the "
    "run.",
    MIXED: "The maximum of a process, in the memory of a GPU or of the machine. Near its size, a run may fail.",
}
_MFU_CAPTIONS = {
    GPU: "Share of the peak FLOPs of the GPUs; 40 to 60 % is good for large models.",
    CPU: "Share of the peak FLOPs of the CPU, which peak_tflops states.",
    MIXED: "Share of the peak FLOPs of the devices; on GPUs, 40 to 60 % is good for large models.",
}


_MEMORY_NOTES = {
    GPU: "maximum of a GPU",
    CPU: "maximum of a process, in the machine's memory",
    MIXED: "maximum of a process",
}


def memory_note(runs: list[Run]) -> str:
    return _MEMORY_NOTES[_device_kind(runs)]


def memory_caption(runs: list[Run]) -> str:
    return _MEMORY_CAPTIONS[_device_kind(runs)]


def mfu_caption(runs: list[Run]) -> str:
    return _MFU_CAPTIONS[_device_kind(runs)]


def describe_devices(run: Run) -> str:
    """The devices in words, with each launch that changed them; empty if they are unknown."""
    parts: list[str] = []
    for event in _start_events(run):
        words = _device_list(event["devices"])
        if not parts:
            parts.append(words)
        elif parts[-1].rpartition(": ")[2] != words:
            parts.append(f"from step {event['step']:,}: {words}")
    return "; ".join(parts)


def _device_kind(runs: list[Run]) -> str:
    """CPU or GPU if all launches of all runs had only these; else, or if a run does not say, MIXED."""
    kinds = set()
    for run in runs:
        names = {name for event in _start_events(run) for name in event["devices"]}
        kinds |= {CPU if name == CPU else GPU for name in names} or {MIXED}
    return kinds.pop() if len(kinds) == 1 else MIXED


def _start_events(run: Run) -> Iterable[dict[str, Any]]:
    """The events of launches that have devices: name -> number of processes."""
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
