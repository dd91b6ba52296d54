"""Converts records with any keys to train.jsonl and test.jsonl of input and output. Edit the values below.

The values are those of the 9G guide's example: the Chinese records of medical-o1-reasoning-SFT. `fm9g data index` does
the same while it builds a dataset: --columns, --language-filter, --split.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):  # a copy of this file in another folder needs an installed fm9g
    import checkout  # noqa: F401
from datasets import Dataset, load_dataset

from fm9g.data.prepare.language import is_in_language
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.progress import Progress

data_path = "../../data_test/raw_data/medical_o1_sft_Chinese.json"  # .json or .jsonl
output_path = "../../data_test/converted_data/medical"  # folder of train.jsonl and test.jsonl
input_key, output_key = "Question", "Response"
language = "zh"  # keep only records whose input is in it: zh, en, or "" for all
test_size, seed = 0.05, 3014


def convert(sample: dict[str, Any]) -> dict[str, str] | None:
    """Converts a sample to a record; None if it is left out. Raises UserError for a missing text."""
    for key in (input_key, output_key):
        if not isinstance(sample.get(key), str):
            raise UserError(f"{key}: found {sample.get(key)!r}, expected a text; the keys are {', '.join(sample)}")
    if language and not is_in_language(sample[input_key], language):
        return None
    return {"input": sample[input_key], "output": sample[output_key]}


def write(samples: Dataset, file: Path) -> None:
    with (
        atomic_file(file) as temporary,
        temporary.open("w", encoding="utf-8") as out,
        Progress(file.name, len(samples), "samples") as progress,
    ):
        count = 0
        for sample in samples:
            progress.advance()
            if record := convert(sample):
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
    print(f"{file}: {count} of {len(samples)} samples")


def main() -> None:
    if not Path(data_path).is_file():
        raise UserError(f"data_path: {data_path}: no such file; set data_path in {sys.argv[0]}")
    try:
        samples = load_dataset("json", data_files=data_path, split="train")
    except Exception as error:  # datasets has no base class for its errors
        raise UserError(f"data_path: {data_path}: {error}") from None
    parts = samples.train_test_split(test_size=test_size, seed=seed)
    for name in ("train", "test"):
        write(parts[name], Path(output_path) / f"{name}.jsonl")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"prepare_data.py: {error}")
