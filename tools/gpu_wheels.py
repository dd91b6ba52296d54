"""Fetches the wheels that a GPU machine with torch, but without a package index, lacks: for `make test-gpu` there.

    python tools/gpu_wheels.py                  # what tests/gpu needs, into gpu_wheels/1, gpu_wheels/2, ...
    python tools/gpu_wheels.py --all            # what fm9g needs: all dependencies in pyproject.toml

Run it where there is an index. torch, and what torch brings (nvidia-*, cuda-*, triton), is left out. No folder is
larger than --megabytes, so that they can be carried over one at a time. On the GPU machine, for each of them:

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
THERE = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_wheels"), help="a new folder")
    parser.add_argument("--all", action="store_true", help="all that fm9g requires, not only what tests/gpu imports")
    parser.add_argument("--python", default="3.12", help="the Python of that machine")
    parser.add_argument("--glibc", default="2.28", help="the C library of that machine, at least")
    parser.add_argument("--megabytes", type=int, default=60, help="of a folder, at most")
    options = parser.parse_args()
    if options.output.exists():
        sys.exit(f"{options.output} exists already; remove it, or choose another --output")
    wanted = ["-r", str(ROOT / "tests" / "gpu" / "requirements.txt")]
    if options.all:
        wanted += requirements(ROOT / "pyproject.toml")
    target = ["--only-binary=:all:", "--python-version", options.python, "--implementation", "cp"]
    minors = range(int(options.glibc.partition(".")[2]), 16, -1)
    target += [*(f"--platform=manylinux_2_{minor}_x86_64" for minor in minors), "--platform=manylinux2014_x86_64"]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        wheels = download(resolve(wanted, target), target, Path(folder))
        for number, group in enumerate(groups(wheels, options.megabytes * 10**6), start=1):
            place = options.output / str(number)
            place.mkdir(parents=True)
            for wheel in group:
                wheel.rename(place / wheel.name)
            size = sum(wheel.stat().st_size for wheel in place.iterdir())
            print(f"{place}: {len(group)} wheels, {size / 1e6:.1f} MB")


def requirements(pyproject: Path) -> list[str]:
    """The dependencies of a project, without torch."""
    names = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [name for name in names if not name.startswith("torch")]


def resolve(wanted: list[str], target: list[str]) -> list[str]:
    """NAME==VERSION of all that is to be fetched, what those require included."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*command, "--target", "nowhere", *target, *wanted], check=True, stdout=subprocess.PIPE)
    packages = [item["metadata"] for item in json.loads(report.stdout)["install"]]
    return [f"{each['name']}=={each['version']}" for each in packages if not THERE.match(each["name"].lower())]


def download(packages: list[str], target: list[str], folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, *target, *packages], check=True)
    return sorted(folder.glob("*.whl"))


def groups(wheels: list[Path], most: int) -> list[list[Path]]:
    """Wheels in groups of at most so many bytes, the large ones first."""
    made: list[tuple[int, list[Path]]] = []
    for wheel in sorted(wheels, key=lambda wheel: -wheel.stat().st_size):
        size = wheel.stat().st_size
        if size > most:
            sys.exit(f"{wheel.name} has {size / 1e6:.0f} MB, more than --megabytes")
        for number, (used, group) in enumerate(made):
            if used + size <= most:
                made[number] = used + size, [*group, wheel]
                break
        else:
            made.append((size, [wheel]))
    return [group for _, group in made]


if __name__ == "__main__":
    main()
