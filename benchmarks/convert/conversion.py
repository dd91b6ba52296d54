"""Speed of conversions, compared with copying the same bytes, and their peak memory.

python benchmarks/convert/conversion.py [--gigabytes N] [--rounds N] [--warm] [--folder DIR]

Each conversion is a process of its own, between two copies by shutil.copyfile and fsync. Source files are dropped from
the page cache before each, unless --warm. Needs free disk space of five times the model's size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SHARD_BYTES = 1_500_000_000
CASES = {
    "import": "HF -> 9G",
    "import fp16": "HF -> 9G, bf16 to fp16",
    "export": "9G -> HF",
    "export bin": "9G -> HF, .bin",
    "export fp16": "9G -> HF, bf16 to fp16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the model in bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="read source files from the page cache")
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]), options.gigabytes)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        call("make", folder, options)
        rows: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
        memory = dict.fromkeys(CASES, 0)
        for _ in range(options.rounds):
            for case, row in rows.items():
                sources = [folder / "m.pt"] if "export" in case else sorted((folder / "hf").glob("*.safetensors"))
                size = sum(file.stat().st_size for file in sources)
                before = measured(lambda files=sources: copy(files, folder / "copy"), sources, options.warm, folder)
                set_cache(sources, options.warm)
                found = call(case, folder, options)
                after = measured(lambda files=sources: copy(files, folder / "copy"), sources, options.warm, folder)
                row.append((size / found["seconds"], size / ((before + after) / 2)))
                memory[case] = max(memory[case], found["memory"])
        largest = call("largest", folder, options)["bytes"]
    print(f"\na model of {size / 1e9:.2f} GB, its largest tensor {largest / 1e6:.0f} MB; {options.rounds} rounds")
    print(f"{'':<26}{'MB/s, median':>14}{'copy, MB/s':>14}{'ratios':>24}{'median':>9}{'memory, MB':>12}")
    for case, title in CASES.items():
        ratios = [speed / copied for speed, copied in rows[case]]
        speeds, copies = (statistics.median(pair[i] for pair in rows[case]) / 1e6 for i in (0, 1))
        every = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        median = f"{statistics.median(ratios):.2f}"
        print(f"{title:<26}{speeds:>14.0f}{copies:>14.0f}{every:>24}{median:>9}{memory[case] / 1e6:>12.0f}")


def call(case: str, folder: Path, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--gigabytes", str(options.gigabytes), "--child", case, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    return json.loads(done.stdout.splitlines()[-1])


def copy(files: list[Path], target: Path) -> None:
    target.mkdir()
    for file in files:
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as written:
            os.fsync(written.fileno())


def measured(work: Callable[[], None], sources: list[Path], warm: bool, folder: Path) -> float:
    set_cache(sources, warm)
    start = time.monotonic()
    work()
    seconds = time.monotonic() - start
    shutil.rmtree(folder / "copy")
    os.sync()
    return seconds


def set_cache(files: list[Path], warm: bool) -> None:
    """Drops files from the page cache, or reads them into it."""
    for path in files:
        with path.open("rb") as file:
            if warm:
                while file.read(1 << 24):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- in the process of a conversion


def child(case: str, folder: Path, gigabytes: float) -> dict:
    from fm9g.convert.hf_export import ExportOptions, export_folder
    from fm9g.convert.hf_import import import_folder

    if case == "make":
        make(folder, 3072, max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 3072) / 100.7e6)))
        (folder / "tiny").mkdir()
        make(folder / "tiny", 384, 1)
        return {}
    if case == "largest":
        from fm9g.io.pt_file import open_pt

        return {"bytes": max(tensor.nbytes for tensor in open_pt(folder / "m.pt").values())}

    def convert(source: Path, target: Path) -> None:
        target.mkdir()
        dtype = "fp16" if "fp16" in case else ""
        if case.startswith("import"):
            import_folder(source / "hf", target / "m.pt", dtype=dtype)
        else:
            kind = "bin" if "bin" in case else "safetensors"
            export_folder(source / "m.pt", target / "hf", options=ExportOptions(dtype=dtype, format=kind))

    convert(folder / "tiny", folder / "out")  # imports and one-time allocations do not count
    shutil.rmtree(folder / "out")
    base, start = peak(), time.monotonic()
    convert(folder, folder / "out")
    return {"seconds": time.monotonic() - start, "memory": peak() - base}


def peak() -> int:
    """Peak memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def make(folder: Path, width: int, layers: int) -> None:
    """Writes a .pt file of random bf16 weights, and its Hugging Face folder in shards."""
    import torch

    from fm9g.config.model import ModelConfig
    from fm9g.convert.hf_export import ExportOptions, export_folder
    from fm9g.io.pt_file import write_weights
    from fm9g.model.transformer import weight_shapes

    config = ModelConfig(
        vocab_size=32000 * width // 3072,
        hidden_size=width,
        intermediate_size=8192 * width // 3072,
        num_layers=layers,
        num_heads=width // 128,
        num_kv_heads=width // 384,
    )
    shapes = weight_shapes(config)
    longest = max(shape.numel() for shape in shapes.values())
    values = torch.randn(longest, generator=torch.Generator().manual_seed(0)).bfloat16()
    like = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    write_weights(folder / "m.pt", like, ((name, values[: s.numel()].view(s)) for name, s in shapes.items()))
    (folder / "m.json").write_text(json.dumps(config.to_json()))
    export_folder(folder / "m.pt", folder / "hf", options=ExportOptions(shard_bytes=SHARD_BYTES))


if __name__ == "__main__":
    main()
