"""Prompts from a file, or from the records of a dataset, with the answers that they have there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.config.load import ConfigSource, resolve_sources
from fm9g.config.train import TrainConfig
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.load.record_sample import RecordSample
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.regular_file import check_regular
from fm9g.shorthand.data import resolve_data

_MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class PromptRecord:
    """A prompt.

    Args:
        prompt: a text, or messages.
        reference: the answer of the record; empty: it has none.
        tools: of a conversation.
    """

    prompt: str | list[dict[str, Any]]
    reference: str = ""
    tools: list[dict[str, Any]] | None = None


def read_prompts(file: Path) -> list[PromptRecord]:
    """The prompts of a file: of a .jsonl file a record per line, of any other a text per line.

    Raises UserError that names the line of a record without a prompt.
    """
    check_regular(file, _MAX_FILE_BYTES)
    register_input(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8: {error.reason}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{file}: holds no prompt")
    if file.suffix != ".jsonl":
        return [PromptRecord(line) for _, line in numbered]
    return [_from_record(_parse(line, f"{file}, line {number}"), f"{file}, line {number}") for number, line in numbered]


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def records_of(data: str, keys: Mapping[str, Any], sample: int = 0) -> Iterator[PromptRecord]:
    """The prompts of datasets: of their validation part if `keys` has a val_split, else of all.

    Args:
        data: as in `fm9g train --data`.
        keys: further training keys: val_split, split_seed, data_cache_dir.
        sample: at most so many; 0: all.
    """
    source = ConfigSource("command line", {"data": data, **keys})
    found = resolve_data(resolve_sources(TrainConfig, [source]), {})
    count = 0
    for dataset in found.validation or found.train:
        config = dataset.value
        records = IndexedDataset(
            config.path, sample=RecordSample(config.sample, config.sample_skip, config.sample_seed)
        )
        for index in range(len(records)):
            if sample and count == sample:
                return
            count += 1
            yield _from_record(records[index], f"{config.path}, record {index}")


def _from_record(record: Any, where: str) -> PromptRecord:
    if isinstance(record, str):
        return PromptRecord(record)
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with prompt or messages")
    for key in ("messages", "prompt"):
        messages = record.get(key)
        if isinstance(messages, list) and messages:
            answer = record.get("chosen", "")
            reference = _text(answer[-1] if isinstance(answer, list) and answer else answer)
            if messages[-1].get("role") == "assistant":
                *messages, last = messages
                reference = _text(last)
            if not messages:
                raise UserError(f"{where}: {key}: holds an answer alone")
            return PromptRecord(messages, reference, record.get("tools") or None)
    for prompt, answer in (("prompt", "response"), ("input", "output"), ("text", "")):
        if isinstance(record.get(prompt), str):
            return PromptRecord(record[prompt], _text(record.get(answer, "")))
    raise UserError(f"{where}: has none of messages, prompt, input and text")


def _text(answer: Any) -> str:
    return str(answer.get("content") or "") if isinstance(answer, dict) else str(answer)
