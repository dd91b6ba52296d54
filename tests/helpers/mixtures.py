"""Mixtures of a few small datasets, as tests open them."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.common import index_dataset, make_records, write_jsonl

from fm9g.config.mixture import DatasetConfig, load_mixture
from fm9g.data.load.mixture import Mixture

DATASETS = {"a": make_records(40, 1), "b": make_records(60, 2, longest=120), "c": make_records(30, 3)}


def open_mixture(
    path: Path,
    tokenizer: Path,
    names: str = "",
    token_cache_dir: str = "",
    max_length: int = 64,
    seed: int = 3,
    **extra: dict,
) -> Mixture:
    """names: of the datasets that are taken, in this order; extra: `a={"abs_weight": 2.0}`."""
    entries = {entry["task_name"]: entry for entry in json.loads(path.read_text())}
    chosen = [{**entries[name], **extra.get(name, {})} for name in names or entries]
    changed = path.with_name("changed.json")
    changed.write_text(json.dumps(chosen))
    return Mixture(load_mixture(changed), str(tokenizer), max_length, seed, 2 * max_length, token_cache_dir)


def answer_dataset(folder: Path, text: str) -> DatasetConfig:
    """A dataset of one conversation, in which the assistant answers `text`."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
    write_jsonl(folder / "a.jsonl", [{"messages": messages}])
    index_dataset(folder / "a.jsonl", folder / "data", "en")
    return DatasetConfig(task_name="task", path=str(folder / "data"))
