"""Runs under the names of LLaMA-Factory and ms-swift: steps, rates and trained tokens as those tools define them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from helpers.common import make_records, write_json, write_jsonl

from fm9g.api import open_loader, open_mixture
from fm9g.config.run import RunConfig
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.load.packing import IGNORE_INDEX
from fm9g.run_files import read_metrics
from fm9g.shorthand.load import RunArguments, load_run
from fm9g.train.runner import TrainResult, run_training

RECORDS = 50


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "qa.jsonl", pairs())
    write_json(tmp_path / "dataset_info.json", {"qa": {"file_name": "qa.jsonl", "columns": COLUMNS}})
    return tmp_path


COLUMNS = {"prompt": "input", "response": "output"}


def pairs() -> list[dict]:
    """Records that all have a question."""
    return [
        {**record, "input": record["input"] or f"question {number}"}
        for number, record in enumerate(make_records(RECORDS, longest=20))
    ]


def cosine_rates(peak: float, steps: int, warmup: int) -> list[float]:
    """The rate of each step: get_cosine_schedule_with_warmup of transformers, stepped after each optimizer step."""
    return [
        peak * (n / warmup if n < warmup else 0.5 * (1 + math.cos(math.pi * (n - warmup) / max(1, steps - warmup))))
        for n in range(steps)
    ]


def rates(result: TrainResult) -> list[float]:
    return [line["Optimizer/lr"] for line in read_metrics(result.metrics_file) if "Optimizer/lr" in line]


def trained_texts(run: RunConfig, steps: int) -> list[str]:
    """The trained tokens of each sample of the first steps, decoded."""
    mixture, texts = open_mixture(run), []
    with open_loader(run, mixture) as loader:
        for pack in (pack for _ in range(steps) for pack in loader.next_batch()):
            for start, end in zip(pack.cu_seqlens, pack.cu_seqlens[1:]):
                targets = pack.targets[start:end]
                if pack.task_ids[start] >= 0:
                    texts.append(mixture.tokenizer.decode(targets[targets != IGNORE_INDEX].tolist()))
    return texts


def test_a_yaml_file_of_llamafactory(here: Path, hf_folder: Path, tokenizer_path: Path) -> None:
    (here / "sft.yaml").write_text(
        f"""
model_name_or_path: {hf_folder}
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
dataset: qa
dataset_dir: {here}
template: chatml
cutoff_len: 128
output_dir: saves
logging_steps: 1
save_strategy: no
per_device_train_batch_size: 3
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
dataloader_num_workers: 0
"""
    )
    run = load_run(RunArguments(file="sft.yaml"))
    result = run_training(run)
    per_epoch = math.ceil(math.ceil(RECORDS / 3) / 2)
    assert result.step == 2 * per_epoch
    assert rates(result) == pytest.approx(cosine_rates(1e-3, result.step, math.ceil(0.1 * result.step)), rel=1e-9)
    end = load_tokenizer(str(tokenizer_path)).decode([load_tokenizer(str(tokenizer_path)).eos_id])
    answers = sorted(f"{record['output']}<|im_end|>{end}" for record in pairs())
    assert sorted(trained_texts(run, per_epoch)) == answers
    assert (run.train.lora_alpha, run.train.weight_decay, run.train.beta2, run.train.eps) == (8, 0.0, 0.999, 1e-8)


def test_the_arguments_of_sft_sh(here: Path, hf_folder: Path, tokenizer_path: Path) -> None:
    chats = [
        {"system": "s", "query": f"q{i}", "response": f"last {i}", "history": [["first q", "first answer"]]}
        for i in range(RECORDS)
    ]
    write_jsonl(here / "chats.jsonl", chats)
    words = f"""--model_id_or_path {hf_folder} --sft_type lora --tuner_bankend swift --template_type chatml --dtype fp32
        --output_dir output --dataset chats.jsonl --dataset_test_ratio 0.1 --num_train_epochs 1 --max_length 128
        --batch_size 2 --gradient_accumulation_steps 4 --logging_steps 1 --dataloader_num_workers 0"""
    run = load_run(RunArguments(words=tuple(words.split())))
    result = run_training(run)
    trained = RECORDS - int(0.1 * RECORDS)
    assert result.step == math.ceil(trained / 8)
    assert rates(result) == pytest.approx(cosine_rates(1e-4, result.step, math.ceil(0.05 * result.step)), rel=1e-9)
    texts = trained_texts(run, result.step)
    assert len(texts) == trained
    assert all(text.startswith("last ") for text in texts)  # the first answer has no loss
    assert result.best_checkpoint  # evaluated on the others
    assert run.train.lora_layer == ["project_q", "project_k", "project_v"]
