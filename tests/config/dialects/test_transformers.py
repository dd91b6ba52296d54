import dataclasses
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from fm9g.config.dialects.rules import SCHEDULES
from fm9g.config.dialects.table import UNSET
from fm9g.config.dialects.transformers import TRAINING_ARGUMENTS, TRANSFORMERS
from fm9g.config.dialects.translate import Translation, translate
from fm9g.config.load import ConfigSource, build
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError
from fm9g.train.lr_schedule import learning_rate

STEPS = 40
# The command of the job template, as it calls finetune.py.
FINETUNE = {
    "model_name_or_path": "M", "data_path": "d.json", "bf16": "True", "output_dir": "out", "num_train_epochs": "3",
    "per_device_train_batch_size": "2", "per_device_eval_batch_size": "1", "gradient_accumulation_steps": "8",
    "evaluation_strategy": "no", "save_strategy": "steps", "save_steps": "1000", "save_total_limit": "10",
    "learning_rate": "1e-5", "weight_decay": "0.1", "adam_beta2": "0.95", "warmup_ratio": "0.01",
    "lr_scheduler_type": "cosine", "logging_steps": "1", "report_to": "none", "model_max_length": "512",
    "gradient_checkpointing": "True", "lazy_preprocess": "True", "use_lora": "False", "q_lora": "False",
    "deepspeed": "zero3",
}  # fmt: skip
LORA = {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05}


def translated(**given: Any) -> Translation:
    return translate(TRANSFORMERS, given, "command line")


def test_the_command_of_the_job_template() -> None:
    found = translated(**FINETUNE)
    assert found.keys == {
        "model": "M", "data": "d.json", "method": "full", "output_dir": "out", "model.half_type": "bf16",
        "max_length": "512", "packing": False, "oversize_rule": "head",
        "batch_size": "2", "eval_batch_size": "1",
        "gradient_accumulation_steps": "8", "epochs": 3.0, "save_iters": 1000, "save_total_limit": 10, "log_iters": 1,
        "lr": "1e-5", "lr_scheduler": "cosine", "min_lr_ratio": 0.0, "warmup_iters": 0, "warmup_ratio": 0.01,
        "optimizer": "adamw", "weight_decay": "0.1", "decay_norm_and_bias": False, "beta1": 0.9, "beta2": "0.95",
        "eps": 1e-8, "clip_grad": 1.0, "seed": 42, "report_to": "none", "activation_checkpoint": "full",
        "zero_level": 3,
    }  # fmt: skip
    assert build(TrainConfig, [ConfigSource("", _train_keys(found), text=True)]).beta2 == 0.95
    assert found.origins["warmup_ratio"] == "command line: --warmup_ratio"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"use_lora": "True"}, {"method": "lora", **LORA}),
        ({"use_lora": "True", "q_lora": "True"}, {"method": "qlora", **LORA}),
        ({"use_lora": True, "lora_target_modules": "q_proj,v_proj"}, {"lora_layer": ["q_proj", "v_proj"]}),
        ({"lora_r": 8}, {"method": "full", "lora_r": None}),
        ({"max_steps": 7}, {"train_iters": 7, "epochs": None}),
        ({"warmup_steps": 2.7}, {"warmup_iters": 2, "warmup_ratio": 0.0}),
        ({"warmup_steps": 0.1}, {"warmup_iters": 0, "warmup_ratio": 0.1}),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, {"warmup_iters": 5, "warmup_ratio": 0.0}),
        ({"fp16": True}, {"model.half_type": "fp16"}),
        ({}, {"model.half_type": "fp32", "lr_scheduler": "linear", "epochs": 3.0, "batch_size": 8, "lr": 5e-5}),
        ({"torch_dtype": "auto"}, {"model.half_type": None}),
        ({"eval_data_path": "v"}, {"val_data": None}),
        ({"eval_data_path": "v", "eval_strategy": "steps"}, {"val_data": "v", "eval_iters": 500}),
        ({"eval_data_path": "v", "eval_strategy": "steps", "eval_steps": 0.1}, {"eval_iters": 0.1}),
        ({"eval_data_path": "v", "eval_strategy": "epoch", "max_steps": 9}, {"eval_iters": 2**31 - 1}),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": "1e-6"},
                "learning_rate": 1e-5,
            },
            {"min_lr_ratio": pytest.approx(0.1)},
        ),
        ({"eval_data_path": "v", "evaluation_strategy": "epoch", "num_train_epochs": 4}, {"eval_iters": 0.25}),
        ({"save_strategy": "no"}, {"save": False, "save_iters": None}),
        ({"save_strategy": "epoch", "num_train_epochs": 2}, {"save_iters": 0.5}),
        ({"save_total_limit": "None"}, {"save_total_limit": None}),
        ({"resume_from_checkpoint": "out/checkpoint-500"}, {"resume_ckpt": "500"}),
        ({"optim": "adafactor"}, {"optimizer": "adafactor"}),
        ({"report_to": ["wandb", "tensorboard"]}, {"report_to": "wandb,tensorboard"}),
    ],
)
def test_arguments_that_decide_together(given: dict[str, Any], expected: dict[str, Any]) -> None:
    keys = translated(**given).keys
    assert {key: keys.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scheduler_type": "greedy"}, "it depends on the loss"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": 2}'}, "cannot be set for cosine"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "low"}}, "min_lr: found 'low'"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "warmup"),
        ({"bf16": True, "fp16": "true"}, "both true"),
        ({"optim": "lion_8bit"}, "there is no such optimizer"),
        ({"push_to_hub": ""}, None),
        ({"push_to_hub": "True"}, "fm9g convert"),
        ({"group_by_length": "False", "train_sampling_strategy": "random"}, None),
        ({"group_by_length": "True"}, "write false"),
        ({"fsdp": "full_shard"}, "zero_level 3"),
        ({"evaluation_strategy": "epochs"}, "did you mean 'epoch'"),
        ({"per_device_batch_size": 1}, "did you mean 'per_device"),
        ({"deepspeed": "missing.json"}, "missing.json: no such file"),
    ],
)
def test_what_is_not_supported_is_refused(given: dict[str, Any], message: str | None) -> None:
    if message is None:
        translated(**given)
        return
    with pytest.raises(UserError, match=message):
        translated(**given)


def test_every_argument_of_the_trainer_has_a_row_and_its_default() -> None:
    rows = {row.name: row for row in TRAINING_ARGUMENTS}
    for each in dataclasses.fields(TrainingArguments):
        row = TRANSFORMERS.row_of(each.name)
        assert row is not None, each.name
        if each.name in rows and row.default is not UNSET:
            assert row.default == each.default, each.name
        if row.refused and each.default not in (None, dataclasses.MISSING):
            assert each.default in row.harmless, each.name


OPTIONS: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "cosine_with_min_lr": {"min_lr": 2e-4},
    "warmup_stable_decay": {"num_decay_steps": 10, "decay_type": "linear"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_of_every_step_is_that_of_transformers(name: str) -> None:
    given = {"lr_scheduler_type": name, "lr_scheduler_kwargs": OPTIONS.get(name, {}), "warmup_steps": 0.16}
    found = translated(learning_rate=2e-3, max_steps=STEPS, **given)
    config = build(TrainConfig, [ConfigSource("", _train_keys(found), text=True)])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    warmup = TrainingArguments(warmup_steps=0.16).get_warmup_steps(STEPS)
    scheduler = get_scheduler(name, optimizer, warmup, STEPS, scheduler_specific_kwargs=OPTIONS.get(name, {}))
    for n in range(STEPS):
        assert learning_rate(config, n) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15), n
        optimizer.step()
        scheduler.step()


def _train_keys(found: Translation) -> dict[str, Any]:
    return {key: value for key, value in found.keys.items() if not key.startswith("model.")}
