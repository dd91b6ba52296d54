"""Recognizes what a path contains, for messages to users who gave something else than expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fm9g.errors import UserError
from fm9g.run_files import EVENTS_FILE, METRICS_FILE

DATASET, DATASET_PART, DATA = "an indexed dataset", "a part of an indexed dataset", "data"
MIXTURE, MODEL_CONFIG, TRAIN_CONFIG = "a mixture", "a model configuration", "a training configuration"
CHECKPOINT, ADAPTER, WEIGHTS = "a 9G checkpoint", "an adapter", "the weights of a 9G model"
RUN, RUNS, LOG = "the checkpoints of a run", "the checkpoints of several runs", "the log of a run"
MODEL, TOKENIZER = "a Hugging Face folder", "a tokenizer"

_INDEX_FILES = ("index", "index.h5")
_WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
_TOKENIZER_PATTERNS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".md")
_RECORD_KEYS = {"input", "output", "instruction", "messages", "conversations", "text", "prompt", "response"}
_MAX_JSON_BYTES = 1 << 20  # bytes of a .json file that are examined


def check_kind(path: Path, *expected: str, also: str = "") -> None:
    """Raises UserError if a path contains something known that is not expected; it says what, and how to use it.

    also: a further accepted kind, which the message does not mention.
    """
    kind = kind_of(path)
    if kind and kind not in (*expected, also):
        raise UserError(f"{path}: found {kind}, expected {' or '.join(expected)}. {_advice(path, kind, expected)}")


def kind_of(path: Path) -> str:
    """One of the constants above; empty if unknown."""
    return _kind_of_folder(path) if path.is_dir() else _kind_of_file(path) if path.is_file() else ""


def _kind_of_folder(folder: Path) -> str:
    def has(*names: str) -> bool:
        return any((folder / name).is_file() for name in names)

    if has("data.jsonl") and has(*_INDEX_FILES):
        return DATASET
    if has("config.json") and any(next(folder.glob(pattern), None) for pattern in _WEIGHT_PATTERNS):
        return MODEL
    if has("adapter_config.json"):
        return ADAPTER
    if has("manifest.json"):
        return CHECKPOINT
    if has(METRICS_FILE) and has(EVENTS_FILE):
        return LOG
    if any(file.parent.name.isdecimal() for file in folder.glob("*/manifest.json")):
        return RUN
    if any(file.parent.name.isdecimal() for file in folder.glob("*/*/manifest.json")):
        return RUNS
    tokenizer = any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_PATTERNS)
    return TOKENIZER if tokenizer and not has("config.json") else ""  # else a model without its weights


def _kind_of_file(file: Path) -> str:
    if file.name in _INDEX_FILES and kind_of(file.parent) == DATASET:
        return DATASET_PART
    if file.suffix == ".pt":
        return WEIGHTS
    if file.suffix in _DATA_SUFFIXES:
        return DATA
    return _kind_of_json(file) if file.suffix == ".json" else ""


def _kind_of_json(file: Path) -> str:
    with file.open("rb") as content:
        text = content.read(_MAX_JSON_BYTES).decode("utf-8-sig", "ignore").lstrip()
    try:
        first: Any = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())[0]
    except (ValueError, RecursionError):
        return ""
    if not isinstance(first, dict) or not first:
        return ""
    keys = set(first)
    if keys & _RECORD_KEYS:
        return DATA
    if text.startswith("["):
        return {0: DATA, 1: "", 2: MIXTURE}[("task_name" in keys) + ("path" in keys)]
    if {"nlines", "nbytes"} <= keys:
        return DATASET_PART  # meta.json
    if {"vocab_size", "dim_model"} <= keys:
        return MODEL_CONFIG
    return TRAIN_CONFIG if keys <= {"pretrain", "finetune"} else ""


def _advice(path: Path, kind: str, expected: tuple[str, ...]) -> str:
    """How to use what the path contains."""
    if kind == RUN and CHECKPOINT not in expected:
        return f"`fm9g convert {path / 'last'} FOLDER` makes a Hugging Face folder of its last checkpoint"
    if kind == RUN:
        steps = sorted((step.parent.name for step in path.glob("*/manifest.json")), key=lambda name: (len(name), name))
        return f"Give one of them: {', '.join(str(path / name) for name in (*steps[-3:], 'last', 'best'))}"
    if kind == RUNS:
        names = sorted({run.parent.parent.name for run in path.glob("*/*/manifest.json")})
        return f"Give a checkpoint of one of them, such as {path / names[0] / 'last'}; the runs: {', '.join(names)}"
    both = f"Training starts from it with --pretrained_model {path}; `fm9g convert {path} FOLDER` makes a Hugging Face "
    return {
        DATASET: f"A mixture in dataset_configs/ names it as the path of a dataset; training takes it as --data {path}",
        DATASET_PART: f"Give the folder, {path.parent}, or its data.jsonl",
        DATA: f"`fm9g data index --path {path} --language zh --output FOLDER` makes an indexed dataset of it (zh, en "
        f"or code), and a mixture in dataset_configs/ names that FOLDER; training takes it as --data {path}",
        MIXTURE: f"Training takes it as --dataset_config {path}",
        MODEL_CONFIG: f"Training takes it as --config {path}",
        TRAIN_CONFIG: f"Training takes it as --config {path}",
        CHECKPOINT: both + "folder of it",
        WEIGHTS: both + "folder of it",
        ADAPTER: f"`fm9g lora merge BASE {path} FOLDER` makes a Hugging Face folder of it and the model that it was "
        "trained on",
        LOG: f"`fm9g report {path}` shows it; the checkpoints are in data/checkpoints/",
        MODEL: f"`fm9g generate {path}` continues a prompt with it, and `fm9g convert {path} FILE.pt` makes a 9G model "
        "of it",
        TOKENIZER: "It goes with --tokenizer (data) or --tokenizer_path (train)",
    }[kind]
