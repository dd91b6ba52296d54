"""Python, the packages that fm9g uses, CUDA and the GPUs that torch sees.

Each package is imported in a separate process, since a broken wheel can crash the interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fm9g.doctor.findings import ERROR, OK, WARNING, Finding
from fm9g.hardware import GIB
from fm9g.io.safe_path import python_command
from fm9g.progress import Progress

IMPORT_TIMEOUT = 120.0  # seconds; on a busy machine an import is many times slower
_OPTIONAL = {
    "bmtrain": "import bmtrain",
    "flash-attn": "import flash_attn",
    "opendelta": "from fm9g.lora.inject import import_opendelta; import_opendelta()",
    "bitsandbytes": "import bitsandbytes",
}
_GPU_PACKAGES = ("bmtrain", "flash-attn")  # they are imported only on machines with a GPU
_MISSING = {  # on a machine with a GPU
    "bmtrain": "the torch engine is used; for bmtrain: pip install --no-deps bmtrain==1.0.1 (CPython 3.10 or 3.11; on "
    "others it is built from source, with nvcc)",
    "flash-attn": "attention uses torch's own kernel for packed rows; pip install flash-attn --no-build-isolation",
    "opendelta": "only for --lora_backend opendelta: pip install --no-deps opendelta==0.3.2",
    "bitsandbytes": "only for quantization and adamw8bit: pip install bitsandbytes",
}
_NCCL_WHEELS = ("nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
_REQUIREMENT = re.compile(r"([\w.-]+)(?:>=([\d.]+))?")
# Oldest Linux driver for a CUDA major version (CUDA Toolkit release notes, minor version compatibility).
_DRIVERS = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
# Pattern in the error of a failed import -> advice. The first match is shown.
_FAILURES = (
    (r"compiled using NumPy 1|numpy\.core\.multiarray failed", "built for numpy 1, and fm9g needs numpy 2: upgrade it"),
    (r"undefined symbol: nccl|libnccl", "the installed NCCL is not the one it was built for: pip uninstall "
     "nvidia-nccl-cu11, reinstall the one that torch requires, then pip install --no-deps bmtrain==1.0.1"),
    (r"undefined symbol|libc10|libtorch|GLIBCXX", "built for another torch, CUDA or C++ ABI: install the wheel for "
     "{torch}, or build it here: pip install --no-build-isolation --no-binary :all: --no-deps {name}"),
    (r"lib(cudart|cublas|cusparse|nvrtc)[\w.]*so", "built for another CUDA than {torch}: install one for that"),
    (r"No module named '?([\w.]+)", "install what is missing: pip install {found}"),
)  # fmt: skip
_TORCH = """
import json, torch
cuda = torch.cuda
gpus = [(cuda.get_device_name(i), *cuda.mem_get_info(i), *cuda.get_device_capability(i))
        for i in range(cuda.device_count())] if cuda.is_available() else []
nccl = cuda.nccl.version() if torch.version.cuda and torch.distributed.is_nccl_available() else ()
bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus, "arch": cuda.get_arch_list(),
    "bf16": bf16, "nccl": ".".join(map(str, nccl)), "gloo": torch.distributed.is_gloo_available(),
    "abi": torch._C._GLIBCXX_USE_CXX11_ABI}))
"""


@dataclass(frozen=True)
class Probe:
    """The result of an import.

    Args:
        output: what the process printed.
        failure: why the import failed; empty: it did not.
        hung: it was still running after the timeout.
    """

    output: str
    failure: str = ""
    hung: bool = False


def check_packages(
    probe: Callable[[str], Probe] | None = None, versions: Mapping[str, str] | None = None, cores: int | None = None
) -> tuple[list[Finding], dict[str, Any]]:
    """Checks which packages are installed and can be imported.

    One import per processor runs at a time; more would slow each other down.

    Args:
        probe: tries an import; default: `probe`.
        versions: package -> installed version, empty if it is missing; default: those of this environment.
        cores: processors; default: those of this machine.

    Returns:
        The findings, and what torch reports about itself and this machine; empty if it cannot be asked.
    """
    probe, versions = probe or run_probe, installed_versions() if versions is None else versions
    codes = {"torch": _TORCH, "numpy": "import numpy", "transformers": "import transformers"}
    codes |= {name: code for name, code in _OPTIONAL.items() if versions.get(name)}
    probes: dict[str, Probe] = {}
    threads = cores or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool, Progress("imports", len(codes), "packages") as bar:
        running = {pool.submit(probe, code): name for name, code in codes.items()}
        for done in as_completed(running):
            probes[running[done]] = done.result()
            bar.advance()
    torch = {} if probes["torch"].failure else json.loads(probes["torch"].output.splitlines()[-1])
    findings = [
        _check_python(),
        *check_requirements(requirements(), versions, probes, torch),
        *check_gpus(torch, driver_version()),
        check_nccl(torch, versions),
    ]
    optional = [check_optional(name, versions.get(name, ""), probes.get(name), torch) for name in _OPTIONAL]
    return findings + optional, torch


def run_probe(code: str, timeout: float = IMPORT_TIMEOUT) -> Probe:
    """Runs Python code in a separate process."""
    try:
        done = subprocess.run(
            python_command(code), capture_output=True, encoding="utf-8", errors="replace", timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return Probe("", f"slow: its import was not finished after {timeout:.0f} s", hung=True)
    if done.returncode < 0:
        return Probe(done.stderr, f"ended the interpreter ({signal.Signals(-done.returncode).name})")
    last = (done.stderr.strip() or "unknown error").splitlines()[-1]
    return Probe(done.stdout if not done.returncode else done.stderr, last if done.returncode else "")


def installed_versions() -> dict[str, str]:
    """Package -> version of every installed package that this file asks about."""
    names = [*_OPTIONAL, *_NCCL_WHEELS, *(match[1] for match in map(_REQUIREMENT.fullmatch, requirements()) if match)]
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def requirements() -> list[str]:
    """What fm9g requires, such as "numpy>=2"."""
    try:
        return metadata.requires("fm9g") or []
    except metadata.PackageNotFoundError:
        return ["torch>=2.11", "transformers>=4.56", "numpy>=2"]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def _check_python() -> Finding:
    found = sys.version.split()[0]
    if not (3, 10) <= sys.version_info[:2] < (3, 14):
        return Finding(ERROR, "Python", found, "fm9g needs 3.10 to 3.13")
    return Finding(OK, "Python", found)


def check_requirements(
    required: list[str], versions: Mapping[str, str], probes: Mapping[str, Probe], torch: dict[str, Any]
) -> Iterator[Finding]:
    """Checks that the required packages are installed, new enough, and that the large ones can be imported."""
    others = 0
    for text in required:
        match = _REQUIREMENT.fullmatch(text)
        if not match:  # of an extra
            continue
        name, oldest = match[1], match[2] or "0"
        version = versions.get(name, "")
        if not version or _numbers(version) < _numbers(oldest):
            yield Finding(ERROR, name, version or "missing", f"pip install '{text}'")
        elif name in probes and probes[name].hung:
            yield Finding(WARNING, name, f"{version}: {probes[name].failure}", _slow_import_hint(f"import {name}"))
        elif name in probes and probes[name].failure:
            yield Finding(ERROR, name, f"{version}: {probes[name].failure}", _install_hint(name, probes[name], torch))
        elif name in probes:
            yield Finding(OK, name, version)
        else:
            others += 1
    yield Finding(OK, "other packages", f"{others} required ones are installed")


def driver_version() -> str:
    """The version of NVIDIA's kernel module, or an empty string."""
    file = Path("/proc/driver/nvidia/version")
    match = (
        re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", file.read_text("utf-8", "replace"))
        if file.is_file()
        else None
    )
    return match[1] if match else ""


def check_gpus(torch: dict[str, Any], driver: str) -> Iterator[Finding]:
    """Checks driver and GPUs. driver: version of NVIDIA's kernel module; empty: there is none."""
    cuda, gpus = torch.get("cuda"), torch.get("gpus", [])
    if not torch:
        found = f"NVIDIA driver {driver}" if driver else "no NVIDIA driver"
        yield Finding(WARNING, "GPU", f"{found}; torch could not be asked", "see the line of torch")
        return
    if not driver and not gpus:
        yield Finding(OK, "GPU", f"none; training runs on the CPU (CUDA of torch: {cuda or 'none'})")
        return
    oldest = _DRIVERS.get((cuda or "").split(".")[0], "0")
    if not cuda:
        yield Finding(
            ERROR, "CUDA", f"NVIDIA driver {driver}, but torch is a build without CUDA", "install torch for CUDA"
        )
    elif driver and _numbers(driver) < _numbers(oldest):
        yield Finding(
            ERROR, "CUDA", f"{cuda}, NVIDIA driver {driver}", f"it needs driver {oldest}, or torch for older CUDA"
        )
    elif not gpus:
        yield Finding(ERROR, "CUDA", f"{cuda}, driver {driver}, but torch sees no GPU", "look at CUDA_VISIBLE_DEVICES, "
                   "nvidia-smi and, in a container, at --gpus all")  # fmt: skip
    else:
        yield Finding(OK, "CUDA", f"{cuda}, NVIDIA driver {driver or 'unknown'}")
    for number, (name, free, total, major, minor) in enumerate(gpus):
        found = f"{name}, {total / GIB:.1f} GiB, compute capability {major}.{minor}"
        used, kernels = total - free, {arch.split("_")[-1].rstrip("af")[:-1] for arch in torch["arch"]}
        if str(major) not in kernels:
            yield Finding(ERROR, f"GPU {number}", found, f"torch has kernels for {', '.join(torch['arch'])} only")
        elif major < 8:
            yield Finding(
                WARNING, f"GPU {number}", f"{found}, no bf16", "--model.half_type fp16; flash-attn needs 8.0, too"
            )
        elif used > 0.1 * total:
            yield Finding(
                WARNING,
                f"GPU {number}",
                f"{found}, {used / GIB:.1f} GiB in use",
                "other programs use it: see nvidia-smi",
            )
        else:
            yield Finding(OK, f"GPU {number}", f"{found}, bf16")
    if len({tuple(gpu[:1] + gpu[2:]) for gpu in gpus}) > 1:
        yield Finding(
            WARNING, "GPUs", "of several models", "the slowest determines the speed, and the smallest the memory"
        )


def check_nccl(torch: dict[str, Any], versions: Mapping[str, str]) -> Finding:
    wheels = [f"{name} {versions[name]}" for name in _NCCL_WHEELS if versions.get(name)]
    unknown = "none" if torch else "not known: torch could not be asked"
    found = torch.get("nccl") or ("none: gloo is used" if torch.get("gloo") else unknown)
    if len(wheels) > 1:
        advice = (
            "they write the same file: uninstall both, then install the one that torch requires; bmtrain with --no-deps"
        )
        return Finding(ERROR if torch.get("gpus") else WARNING, "NCCL", f"{found}; {', '.join(wheels)}", advice)
    if torch.get("gpus") and not torch.get("nccl"):
        return Finding(ERROR, "NCCL", found, "install a torch build with NCCL; several GPUs need it to train together")
    return Finding(OK, "NCCL", found)


def check_optional(name: str, version: str, found: Probe | None, torch: dict[str, Any]) -> Finding:
    """Checks an optional package. version: empty: not installed. found: result of its import; None: not tried."""
    on_gpu = bool(torch.get("gpus"))
    if found is None:
        if not on_gpu:
            return Finding(OK, name, "not needed here: no GPU" if torch else "not installed")
        return Finding(WARNING if name in _GPU_PACKAGES else OK, name, "missing", _MISSING[name])
    if found.hung:
        return Finding(WARNING, name, f"{version}: {found.failure}", _slow_import_hint(_OPTIONAL[name]))
    if found.failure and name in _GPU_PACKAGES and torch and not on_gpu:
        return Finding(OK, name, f"{version}, cannot be imported ({found.failure}); not needed here: no GPU")
    if found.failure:
        return Finding(
            ERROR if on_gpu else WARNING, name, f"{version}: {found.failure}", _install_hint(name, found, torch)
        )
    if name == "bmtrain" and version != "1.0.1":
        return Finding(WARNING, name, version, "fm9g is tested with 1.0.1")
    if name == "flash-attn" and _numbers(version) < (2, 4, 1):
        return Finding(ERROR, name, version, "2.4.1 is the first with a deterministic backward pass: upgrade it")
    return Finding(OK, name, version)


def _slow_import_hint(code: str) -> str:
    return f"this machine is very busy, or the import hangs: try it alone, python -c '{code}'"


def _install_hint(name: str, found: Probe, torch: dict[str, Any]) -> str:
    here = f"torch {torch.get('version', '?')}, CUDA {torch.get('cuda') or 'none'}"
    here += f", cxx11abi{str(torch.get('abi', '?')).upper()}, cp{sys.version_info[0]}{sys.version_info[1]}"
    for pattern, text in _FAILURES:
        if match := re.search(pattern, f"{found.output}\n{found.failure}"):
            return text.format(name=name, torch=here, found=match[match.lastindex or 0])
    return f"reinstall or uninstall it: pip uninstall {name}"
