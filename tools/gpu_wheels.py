"""Fetches wheels for `make test-gpu` on a GPU machine that has torch, but no package index.

    python tools/gpu_wheels.py                  # for tests/gpu, into gpu_wheels/1, gpu_wheels/2, ...
    python tools/gpu_wheels.py --all            # for fm9g: all dependencies in pyproject.toml

Run it on a machine with an index. torch and its dependencies (nvidia-*, cuda-*, triton) are left out. Each folder is
at most --megabytes large, so that you can copy the folders one at a time. On the GPU machine, for each folder:

    python3 -m pip install --no-index --no-deps FOLDER/*.whl
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PREINSTALLED = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_wheels"), help="a new folder")
    parser.add_argument("--all", action="store_true", help="all dependencies of fm9g, not only those of tests/gpu")
    parser.add_argument("--python", default="3.12", help="the Python of that machine")
    parser.add_argument("--glibc", default="2.28", help="the C library of that machine, at least")
    parser.add_argument("--megabytes", type=int, default=60, help="of a folder, at most")
    options = parser.parse_args()
    if options.output.exists():
        sys.exit(f"{options.output} exists already; remove it, or choose another --output")
    requested = ["-r", str(ROOT / "tests" / "gpu" / "requirements.txt")]
    if options.all:
        requested += requirements(ROOT / "pyproject.toml")
    target = ["--only-binary=:all:", "--python-version", options.python, "--implementation", "cp"]
    minors = range(int(options.glibc.partition(".")[2]), 16, -1)
    target += [*(f"--platform=manylinux_2_{minor}_x86_64" for minor in minors), "--platform=manylinux2014_x86_64"]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        wheels = download(resolve(requested, target), target, Path(folder))
        for number, group in enumerate(groups(wheels, options.megabytes * 10**6), start=1):
            target_folder = options.output / str(number)
            target_folder.mkdir(parents=True)
            for wheel in group:
                wheel.rename(target_folder / wheel.name)
            size = sum(wheel.stat().st_size for wheel in target_folder.iterdir())
            print(f"{target_folder}: {len(group)} wheels, {size / 1e6:.1f} MB")


def requirements(pyproject: Path) -> list[str]:
    """The dependencies of a project, without torch."""
    names = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [name for name in names if not name.startswith("torch")]


def resolve(requested: list[str], target: list[str]) -> list[str]:
    """NAME==VERSION of the requested packages and their dependencies, without preinstalled ones."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*command, "--target", "nowhere", *target, *requested], check=True, stdout=subprocess.PIPE)
    packages = [item["metadata"] for item in json.loads(report.stdout)["install"]]
    return [f"{each['name']}=={each['version']}" for each in packages if not PREINSTALLED.match(each["name"].lower())]


def download(packages: list[str], target: list[str], folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, *target, *packages], check=True)
    return sorted(folder.glob("*.whl"))


def groups(wheels: list[Path], max_bytes: int) -> list[list[Path]]:
    """Divides wheels into groups of at most max_bytes; first fit, the largest wheel first."""
    filled: list[tuple[int, list[Path]]] = []
    for wheel in sorted(wheels, key=lambda wheel: -wheel.stat().st_size):
        size = wheel.stat().st_size
        if size > max_bytes:
            sys.exit(f"{wheel.name} has {size / 1e6:.0f} MB, more than --megabytes")
        for number, (used, group) in enumerate(filled):
            if used + size <= max_bytes:
                filled[number] = used + size, [*group, wheel]
                break
        else:
            filled.append((size, [wheel]))
    return [group for _, group in filled]


if __name__ == "__main__":
    main()
