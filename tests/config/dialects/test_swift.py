from typing import Any

import pytest

from fm9g.config.dialects.swift import SWIFT
from fm9g.config.dialects.translate import detect, translate
from fm9g.errors import UserError

# The command of its quick start.
QUICK_START = {
    "model": "M", "tuner_type": "lora", "dataset": ["zh.jsonl#500", "en.jsonl#500"], "torch_dtype": "bfloat16",
    "num_train_epochs": "1", "per_device_train_batch_size": "1", "per_device_eval_batch_size": "1",
    "learning_rate": "1e-4", "lora_rank": "8", "lora_alpha": "32", "target_modules": "all-linear",
    "gradient_accumulation_steps": "16", "eval_steps": "50", "save_steps": "50", "save_total_limit": "2",
    "logging_steps": "5", "max_length": "2048", "output_dir": "output", "system": "S", "warmup_ratio": "0.05",
    "dataloader_num_workers": "4", "model_author": "swift", "model_name": "swift-robot",
}  # fmt: skip


def keys(**given: Any) -> dict[str, Any]:
    return translate(SWIFT, given, "command line").keys


def test_the_command_of_the_quick_start() -> None:
    assert detect(QUICK_START) is SWIFT
    assert keys(**QUICK_START) == {
        "model": "M", "method": "lora", "data": "zh.jsonl#500,en.jsonl#500", "model.half_type": "bf16", "epochs": 1.0,
        "batch_size": 1, "eval_batch_size": "1", "lr": 1e-4, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.05,
        "lora_layer": ["all"], "use_rslora": False, "use_dora": False, "loraplus_lr_ratio": 1.0,
        "init_lora_weights": "default", "gradient_accumulation_steps": 16, "save_iters": 50, "save_total_limit": 2,
        "log_iters": 5, "max_length": 2048, "oversize_rule": "drop", "output_dir": "output", "system": "S",
        "warmup_iters": 0, "warmup_ratio": 0.05, "dataloader_num_workers": "4", "train_on": "assistant",
        "lr_scheduler": "cosine", "min_lr_ratio": 0.0, "optimizer": "adamw", "weight_decay": 0.1, "beta1": 0.9,
        "beta2": 0.95, "eps": 1e-8, "clip_grad": 1.0, "activation_checkpoint": "full", "report_to": "tensorboard",
        "packing": False, "decay_norm_and_bias": False, "seed": 42, "split_seed": 42,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"lr": 1e-4, "batch_size": 1, "global_batch_size": 16, "val_split": None}),
        ({"tuner_type": "full"}, {"method": "full", "lr": 1e-5, "lora_r": None}),
        ({"train_type": "full", "learning_rate": 3e-5}, {"lr": 3e-5}),
        ({"per_device_train_batch_size": 3}, {"batch_size": 3, "global_batch_size": 6}),
        ({"report_to": "none"}, {"report_to": "none"}),
        ({"report_to": ["wandb", "tensorboard"]}, {"report_to": "wandb,tensorboard"}),
        ({"val_dataset": "v", "save_steps": 20}, {"val_data": "v", "eval_iters": 20, "save_iters": 20}),
        ({"val_dataset": "v", "save_strategy": "epoch"}, {"eval_iters": 1 / 3, "save_iters": 1 / 3}),
        ({"split_dataset_ratio": 0.01, "eval_steps": 7}, {"val_split": 0.01, "eval_iters": 7}),
        ({"split_dataset_ratio": 0.01, "eval_strategy": "no"}, {"val_split": None, "eval_iters": None}),
        ({"quant_bits": 4, "quant_method": "bnb"}, {"method": "qlora", "quantization": "nf4"}),
        ({"quant_bits": 4, "bnb_4bit_quant_type": "fp4"}, {"quantization": "fp4"}),
        ({"bnb_4bit_use_double_quant": False}, {"double_quant": False}),
        ({"truncation_strategy": "left"}, {"oversize_rule": "tail"}),
        ({"truncation_strategy": "split"}, {"oversize_rule": "segment"}),
        ({"loss_scale": "last_round"}, {"train_on": "last"}),
        ({"loss_scale": "all"}, {"train_on": "all"}),
        ({"use_chat_template": False}, {"chat_template": "none"}),
        ({"template": "qwen"}, {"chat_template": "tokenizer"}),
        ({"packing": "true"}, {"packing": True}),
        ({"init_weights": "pissa"}, {"init_lora_weights": "pissa"}),
        ({"lorap_lr_ratio": 16}, {"loraplus_lr_ratio": 16}),
        ({"use_dora": True, "use_rslora": True}, {"use_dora": True, "use_rslora": True}),
        ({"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}),
        ({"adapters": ["A"]}, {"adapter": "A"}),
        ({"attn_impl": "flash_attn"}, {"flash": "cuda"}),
        ({"freeze_parameters": ["a", "b"]}, {"freeze": "a,b"}),
        ({"activation_checkpointing": False}, {"activation_checkpoint": "none"}),
        ({"data_seed": 7}, {"split_seed": 7}),
        ({"early_stop_interval": 3}, {"early_stopping_patience": 3}),
    ],
)
def test_arguments_that_have_an_effect(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = keys(**given)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tuner_type": "longlora"}, "longlora is not supported"),
        ({"init_weights": "olora"}, "olora is not supported"),
        ({"loss_scale": "react"}, "expected one of default"),
        ({"truncation_strategy": "cut"}, "expected one of delete"),
        ({"quant_method": "hqq"}, "bitsandbytes"),
        ({"sequence_parallel_size": 2}, "tp_size"),
        ({"task_type": "seq_cls"}, "models continue texts"),
        ({"dataset_shuffle": False}, "drawn at random"),
        ({"interleave_prob": [0.5, 0.5]}, "write shares behind the names"),
        ({"new_special_tokens": ["<a>"]}, "write the tokens into a file"),
        ({"merge_lora": True}, "fm9g lora merge"),
        ({"use_galore": True}, "GaLore is not supported"),
        ({"lisa_activated_layers": 2}, "LISA is not supported"),
        ({"tuner_typ": "lora"}, "did you mean 'tuner_type'"),
    ],
)
def test_what_is_not_supported_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        keys(**given)


def test_what_is_harmless_is_accepted() -> None:
    given = {"sequence_parallel_size": 1, "task_type": "causal_lm", "dataset_shuffle": True, "merge_lora": "false",
             "lisa_activated_layers": 0, "new_special_tokens": [], "tuner_backend": "peft"}  # fmt: skip
    assert keys(**given) == keys()
