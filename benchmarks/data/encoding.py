"""Speed from records to packed batches, compared with the tokenizer's own encode_batch on the same texts and cores.

    python benchmarks/data/encoding.py [--megabytes 24] [--cores 1 2]

Each figure is measured in a process of its own, bound to its cores; the loader is timed from its second step, when its
workers have started. tokenizers: a byte-level BPE trained on the same records; sentencepiece: that of 9G 2b.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import SHARED, records_of, report, table

MAX_LENGTH, PACKS = 2048, 8


def bare(tokenizer_path: str, source: Path) -> float:
    """Tokens per second of encode_batch."""
    from fm9g.data.encode.tokenizer_loading import load_tokenizer

    records = [json.loads(line) for line in source.open(encoding="utf-8")]
    texts = [record[key] for record in records for key in ("input", "output") if record[key]]
    tokenizer = load_tokenizer(tokenizer_path)
    model = tokenizer._model  # type: ignore[attr-defined]
    started = time.monotonic()
    if tokenizer_path.endswith(".model"):
        tokens = sum(map(len, model.encode(texts, num_threads=len(os.sched_getaffinity(0)))))
    else:
        tokens = sum(len(encoding.ids) for encoding in model.encode_batch(texts, add_special_tokens=False))
    return tokens / (time.monotonic() - started)


def loaded(tokenizer_path: str, dataset: Path, workers: int, cache: str = "") -> float:
    """Tokens per second of the loader over one epoch."""
    from fm9g.config.mixture import DatasetConfig
    from fm9g.data.load.loader import Loader
    from fm9g.data.load.mixture import Mixture
    from fm9g.data.load.token_cache_builder import build_token_cache

    config = DatasetConfig(task_name="all", path=str(dataset), allow_repeat=False, ave_tokens_per_line=300)
    mixture = Mixture([config], tokenizer_path, MAX_LENGTH, seed=1, token_cache_dir=cache)
    if cache:
        mixture = build_token_cache(mixture, workers=0)
    with Loader(mixture, global_batch_size=PACKS, workers=workers, prefetch=4) as loader:
        loader.next_batch()
        started, tokens = time.monotonic(), 0
        while some := sum(pack.tokens for pack in loader.next_batch()):
            tokens += some
        return tokens / (time.monotonic() - started)


def in_process(cores: int, call: str, *arguments: object) -> float:
    """The figure that a process of its own prints, on so many cores."""
    code = f"import encoding; from pathlib import Path; print(encoding.{call})"
    bound = f"import os; os.sched_setaffinity(0, range({cores})); {code}"
    environment = {**os.environ, "RAYON_NUM_THREADS": str(cores), "OMP_NUM_THREADS": str(cores)}
    output = subprocess.check_output(
        [sys.executable, "-c", bound], env=environment, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL
    )
    return float(output.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    from fm9g.data.encode.tokenizer_training import train_tokenizer
    from fm9g.data.prepare.index_builder import build_index
    from fm9g.data.prepare.index_worker import IndexConfig
    from fm9g.data.prepare.sources import find_sources
    from fm9g.data.prepare.texts import iter_texts

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        block = b"".join(records_of("alpaca_zh_demo.json", "alpaca_en_demo.json", "wiki_demo.txt"))
        source = folder / "source.jsonl"
        source.write_bytes(block * max(1, int(options.megabytes * 1e6 / len(block))))
        sources = find_sources([str(source)])
        build_index(sources, folder / "dataset", IndexConfig("zh"))
        train_tokenizer(iter_texts(sources, limit=len(block)), 16_000, folder / "bpe")
        dataset = f"Path({str(folder / 'dataset')!r})"
        tokenizers = {
            "tokenizers": str(folder / "bpe"),
            "sentencepiece": str(SHARED / "tokenizers" / "9g-2b" / "tokenizer.model"),
        }
        for kind, path in tokenizers.items():
            for cores in options.cores:
                alone = in_process(cores, f"bare({path!r}, Path({str(source)!r}))")
                packed = in_process(cores, f"loaded({path!r}, {dataset}, {cores})")
                rows.append(
                    [kind, f"{cores}", f"{alone / 1e3:.0f}", f"{packed / 1e3:.0f}", f"{packed / alone:.0%}", ""]
                )
            cached = in_process(1, f"loaded({path!r}, {dataset}, 0, {str(folder / kind)!r})")
            one = float(rows[-len(options.cores)][3]) * 1e3
            rows.append([kind, "1, from the token cache", "", f"{cached / 1e3:.0f}", "", f"{cached / one:.0f}"])
    head = ["tokenizer", "cores and workers", "encode_batch, thousand tokens/s", "packed, thousand tokens/s", "share"]
    report(f"Encoding {options.megabytes:.0f} MB to packs of {MAX_LENGTH}", table([*head, "x encoding"], rows))


if __name__ == "__main__":
    main()
