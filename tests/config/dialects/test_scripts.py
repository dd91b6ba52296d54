from pathlib import Path
from typing import Any

import pytest
from helpers.common import write_json

from fm9g.config.dialects.scripts import FINETUNE_JSON, JOB, NINE_G_HF
from fm9g.config.dialects.translate import translate
from fm9g.errors import UserError

TRAINER = {
    "packing": False, "decay_norm_and_bias": False, "oversize_rule": "head", "eval_batch_size": 8, "beta1": 0.9,
    "beta2": 0.999, "eps": 1e-8, "optimizer": "adamw",
}  # fmt: skip
# qwen-14b-qlora.json, with the names as its guide writes them.
QLORA: dict[str, Any] = {
    "output_dir": "out", "module_name_or_path": "M", "train_file": "data/train.jsonl", "num_train_epochs": 2,
    "pre_device_train_batch_size": 6, "gradient_accumulation_step": 2, "learning_rate": 2e-4, "max_seq_length": 1024,
    "logging_steps": 100, "save_step": 100, "save_total_limit": 1, "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 100, "lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.05, "gradient_checkpointing": True,
    "disable_tqdm": False, "optim": "paged_adamw_32bit", "seed": 7, "fp16": True, "report_to": "tensorboard",
    "dataloder_num_worker": 0, "save_strategy": "steps", "weight_decay": 0, "max_grad_norm": 0.3,
    "remove_unused_columns": False,
}  # fmt: skip
QLORA_KEYS = TRAINER | {
    "model": "M", "data": "data/train.jsonl", "method": "qlora", "output_dir": "out", "epochs": 2.0, "batch_size": 6,
    "gradient_accumulation_steps": 2, "lr": 2e-4, "max_length": 1024, "log_iters": 100, "save_iters": 100,
    "save_total_limit": 1, "lr_scheduler": "constant", "warmup_iters": 100, "warmup_ratio": 0.0, "lora_r": 64,
    "lora_alpha": 16, "lora_dropout": 0.05, "activation_checkpoint": "full", "seed": 7, "model.half_type": "fp16",
    "report_to": "tensorboard", "dataloader_num_workers": 0, "weight_decay": 0, "clip_grad": 0.3,
}  # fmt: skip


def test_the_json_of_a_qlora_run() -> None:
    assert translate(FINETUNE_JSON, QLORA, "q.json").keys == QLORA_KEYS


def test_the_json_is_read_where_the_script_gets_its_path(tmp_path: Path) -> None:
    file = write_json(tmp_path / "q.json", QLORA)
    found = translate(FINETUNE_JSON, {"train_args_file": str(file)}, "command line")
    assert found.keys == QLORA_KEYS
    assert any(note.startswith("remove_unused_columns") for note in found.all_notes)
    with pytest.raises(UserError, match="--seed: write it into"):
        translate(FINETUNE_JSON, {"train_args_file": str(file), "seed": 3}, "command line")
    write_json(file, {"lora_rnk": 8})
    with pytest.raises(UserError, match=r"q\.json: lora_rnk: .* did you mean 'lora_rank'"):
        translate(FINETUNE_JSON, {"train_args_file": str(file)}, "command line")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"deepspeed": "zero1"}, {"method": "full", "zero_level": 2, "lora_r": None, "max_length": 2048}),
        ({"train_mode": "lora"}, {"method": "lora", "lora_r": 64}),
        ({"train_mode": "full", "lora_rank": 8}, {"method": "full", "lora_r": None}),
    ],
)
def test_what_the_json_trains(given: dict[str, Any], expected: dict[str, Any]) -> None:
    keys = translate(FINETUNE_JSON, given, "q.json").keys
    assert {key: keys.get(key) for key in expected} == expected


def test_the_published_9g_scripts() -> None:
    given = {
        "model_name_or_path": "M", "train_data_config_path": ["a.json", "b.json"], "eval_data_path": "v.json",
        "evaluation_strategy": "steps", "eval_steps": "10", "qlora": "true", "lora_modules": '["q_proj", "v_proj"]',
        "learning_rate": "1e-4", "bf16": "true", "max_steps": "30", "deepspeed": "zero2",
    }  # fmt: skip
    assert translate(NINE_G_HF, given, "command line").keys == TRAINER | {
        "model": "M", "data": "a.json,b.json", "val_data": "v.json", "eval_iters": 10, "method": "qlora",
        "lora_layer": ["q_proj", "v_proj"], "lora_r": 64, "lora_alpha": 32, "lora_dropout": 0.1, "lr": "1e-4",
        "model.half_type": "bf16", "train_iters": 30, "zero_level": 2, "max_length": 512, "batch_size": 8,
        "gradient_accumulation_steps": 1, "lr_scheduler": "linear", "min_lr_ratio": 0.0, "warmup_iters": 0,
        "warmup_ratio": 0.0, "weight_decay": 0.0, "clip_grad": 1.0, "save_iters": 500, "log_iters": 500, "seed": 42,
        "report_to": "none",
    }  # fmt: skip


def test_the_parameters_of_a_job() -> None:
    given = {
        "JobId": "7", "FineTunedModel": "mine", "FileId": "1", "BaseModel": "Qwen", "BaseModelPath": "M",
        "TrainBatchSize": 2, "EvalBatchSize": 3, "AccumulationSteps": 4, "TrainEpoch": 5, "ProcPerNode": 6,
        "EvalSteps": 1500, "SaveSteps": 1600, "SaveTotalLimit": 9, "LearningRate": 1e-5, "WeightDecay": 0.1,
        "WarmupRatio": 0.01, "LoggingSteps": 10, "ModelMaxLength": 512, "Lora": True, "DataPath": "d.json",
        "OutputDir": "out", "ScriptFile": "finetune.py", "MasterPort": 19090, "ValidationFile": "v.json",
        "TrainScript": "",
    }  # fmt: skip
    assert translate(JOB, given, "job.json").keys == {
        "model_unique": "mine", "model": "M", "batch_size": 2, "eval_batch_size": 3, "gradient_accumulation_steps": 4,
        "epochs": 5, "n_gpus": 6, "eval_iters": 1500, "save_iters": 1600, "save_total_limit": 9, "lr": 1e-5,
        "weight_decay": 0.1, "warmup_ratio": 0.01, "warmup_iters": 0, "log_iters": 10, "max_length": 512,
        "method": "lora", "data": "d.json", "output_dir": "out", "val_data": "v.json", "report_to": "none",
        "packing": False, "decay_norm_and_bias": False, "oversize_rule": "head", "model.half_type": "bf16",
        "lr_scheduler": "cosine", "min_lr_ratio": 0.0, "beta2": 0.95, "eps": 1e-8, "activation_checkpoint": "full",
        "seed": 42,
    }  # fmt: skip
    assert {*given, "FileUrl"} == {row.name for row in JOB.rows} - {"report_to"}
    both = {"FileUrl": "https://host/f.json", "DataPath": ""}
    assert translate(JOB, both, "job.json").keys["data"] == "https://host/f.json"
