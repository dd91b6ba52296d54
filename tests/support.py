"""What tests are made of: records, datasets, small models."""

from __future__ import annotations

import random
from pathlib import Path

from fm9g.config.model import ModelConfig
from fm9g.data.build import build_index
from fm9g.data.lines import Settings
from fm9g.data.records import to_line
from fm9g.data.sources import find_sources

ROOT = Path(__file__).resolve().parents[1]
WORDS = """
the quick brown fox jumps over lazy dogs while seven wizards quietly mix 一 二 三 深度 学习 模型
""".split()  # noqa: SIM905


def text(source: random.Random, words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(words))


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_bytes(b"".join(to_line(record) for record in records))
    return path


def records(count: int, seed: int = 0, longest: int = 40) -> list[dict]:
    """Records of unequal length, two thirds of them with an input."""
    source = random.Random(seed)
    return [
        {
            "input": f"{i}: {text(source, source.randint(1, 8))}" if i % 3 else "",
            "output": f"{text(source, source.randint(1, longest))} {i}.",
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


def index(source: Path, output: Path, language: str, overwrite: bool = False, workers: int = 0, **settings) -> dict:
    """Makes an indexed dataset; the content of its meta.json."""
    report = build_index(find_sources([str(source)]), output, Settings(language, **settings), workers, overwrite)
    return report.metas[output]
