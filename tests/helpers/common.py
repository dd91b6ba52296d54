"""What tests are made of: records, datasets, small models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch

from fm9g.config.model import ModelConfig
from fm9g.data.load.loader import Loader
from fm9g.data.load.loader_state import merge_states
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.packing import Pack
from fm9g.data.prepare.index_builder import build_index
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.records import to_line
from fm9g.data.prepare.sources import find_sources
from fm9g.model.transformer import Batch

ROOT = Path(__file__).resolve().parents[2]
WORDS = """
the quick brown fox jumps over lazy dogs while seven wizards quietly mix 一 二 三 深度 学习 模型
""".split()  # noqa: SIM905


def random_text(source: random.Random, words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(words))


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_bytes(b"".join(to_line(record) for record in records))
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def make_records(count: int, seed: int = 0, longest: int = 40) -> list[dict]:
    """Records of unequal length, two thirds of them with an input."""
    source = random.Random(seed)
    return [
        {
            "input": f"{i}: {random_text(source, source.randint(1, 8))}" if i % 3 else "",
            "output": f"{random_text(source, source.randint(1, longest))} {i}.",
        }
        for i in range(count)
    ]


def small_model(**changes: object) -> ModelConfig:
    """A two-layer fp32 model with grouped queries."""
    values: dict = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "half_type": "fp32",
        "max_length": 128,
        "init_std": 0.1,
    }
    return ModelConfig(**{**values, **changes})


LENGTHS = [50, 7, 1, 30]  # of the documents of a batch


def make_batch(seqlens: list[int] = LENGTHS, vocab_size: int = 320, seed: int = 0) -> Batch:
    """Documents of random ids, with a target at every third position."""
    ids = torch.randint(0, vocab_size, (sum(seqlens),), generator=torch.Generator().manual_seed(seed))
    cu_seqlens = torch.tensor([0, *seqlens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in seqlens])
    rows = torch.arange(0, len(ids), 3)
    return Batch(ids, positions, cu_seqlens, seqlens, rows, ids.roll(-1)[rows])


def index_dataset(
    source: Path, output: Path, language: str, overwrite: bool = False, workers: int = 0, **settings
) -> dict:
    """Makes an indexed dataset; the content of its meta.json."""
    report = build_index(find_sources([str(source)]), output, IndexConfig(language, **settings), workers, overwrite)
    return report.metas[output]


def load_steps(mixture: Mixture, count: int, ranks: int = 1, workers: int = 0, state: dict | None = None):
    """The packs of `count` steps in the order of the streams, and the position after them."""
    streams = 4
    loaders = [
        Loader(
            mixture,
            global_batch_size=streams,
            rank=rank,
            world_size=ranks,
            workers=workers,
            state=state,
        )
        for rank in range(ranks)
    ]
    configs = []
    try:
        for _ in range(count):
            by_rank = [loader.next_batch() for loader in loaders]
            configs.append([by_rank[s % ranks][s // ranks] for s in range(streams)])
        return configs, json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))
    finally:
        for loader in loaders:
            loader.close()


def assert_same_packs(some: list[list[Pack]], others: list[list[Pack]]) -> None:
    assert len(some) == len(others)
    for one, other in zip((p for step in some for p in step), (p for step in others for p in step)):
        for key in ("input_ids", "targets", "positions", "cu_seqlens", "task_ids"):
            np.testing.assert_array_equal(getattr(one, key), getattr(other, key))
