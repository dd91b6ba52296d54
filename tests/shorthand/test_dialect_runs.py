"""A run under the names of transformers' Trainer has the steps, rates, losses and tokens that the Trainer has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import make_records, write_json, write_jsonl

from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.run_files import read_metrics
from fm9g.shorthand.load import RunArguments, load_run
from fm9g.train.runner import run_training

RECORDS, EPOCHS = 8, 6
ARGUMENTS = {
    "num_train_epochs": EPOCHS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,  # a step has all records: the order of samples does not matter
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "warmup_steps": 0.34,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_num_workers": 0,
    "use_cpu": True,
}


def pair(record: dict, tokenizer: Any) -> dict[str, list[int]]:
    """Token ids of a record, and its labels: the loss is on the output and the end of the text."""
    prompt = [tokenizer.bos_id, *tokenizer.encode(record["input"])]
    answer = [*tokenizer.encode(record["output"]), tokenizer.eos_id]
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}


def train_with_transformers(model: Path, samples: list[dict[str, list[int]]], out: Path) -> tuple[list[dict], int]:
    """The log of the Trainer, and the number of positions that predict a token in the batches that it trained on."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    predicting = 0

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        nonlocal predicting
        predicting += sum(len(sample["labels"]) - 1 for sample in batch)
        fill = {"input_ids": 0, "labels": -100}
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(sample[name]) for sample in batch], batch_first=True, padding_value=value
            )
            for name, value in fill.items()
        }

    torch.manual_seed(0)
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        TrainingArguments(output_dir=str(out), disable_tqdm=True, **ARGUMENTS),
        train_dataset=samples,
        data_collator=collate,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], predicting


def test_a_run_equals_that_of_the_trainer(
    hf_folder: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    records = make_records(RECORDS, 3)
    write_jsonl(tmp_path / "a.jsonl", records)
    tokenizer = load_tokenizer(str(tokenizer_path))
    theirs, tokens = train_with_transformers(
        hf_folder, [pair(record, tokenizer) for record in records], tmp_path / "theirs"
    )
    content = {**ARGUMENTS, "model_name_or_path": str(hf_folder), "data_path": "a.jsonl", "output_dir": "ours"}
    result = run_training(load_run(RunArguments(file=str(write_json(tmp_path / "run.json", content)))))
    ours = [line for line in read_metrics(result.metrics_file) if "Loss/train" in line]
    assert result.step == len(theirs) == EPOCHS
    assert result.tokens == tokens
    for here, there in (
        ("Optimizer/lr", "learning_rate"),
        ("Optimizer/grad_norm", "grad_norm"),
        ("Loss/train", "loss"),
    ):
        expected = [line[there] for line in theirs]
        assert [line[here] for line in ours] == pytest.approx(expected, rel=1e-4), here
