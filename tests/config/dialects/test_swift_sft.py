import re
from typing import Any

import pytest
from helpers.common import ROOT

from fm9g.config.dialects.swift_sft import SWIFT_SFT
from fm9g.config.dialects.translate import detect, translate
from fm9g.errors import UserError

GUIDES = sorted((ROOT.parent / "shared" / "spec").glob("003_*.txt"))
SFT = {
    "model_type": "qwen-7b-chat", "sft_type": "lora", "template_type": "chatml", "dtype": "bf16",
    "output_dir": "output", "dataset": "blossom-math-zh", "train_dataset_sample": "-1", "num_train_epochs": "1",
    "max_length": "2048", "quantization_bit": "4", "bnb_4bit_comp_dtype": "bf16", "lora_rank": "8",
    "lora_alpha": "32", "lora_dropout_p": "0.05", "lora_target_modules": ["c_attn"],
    "gradient_checkpointing": "true", "batch_size": "1", "weight_decay": "0.01", "learning_rate": "1e-4",
    "gradient_accumulation_steps": "16", "max_grad_norm": "0.5", "warmup_ratio": "0.03", "eval_steps": "100",
    "save_steps": "100", "save_total_limit": "2", "logging_steps": "10", "push_to_hub": "false",
    "only_save_model": "true", "tuner_bankend": "swift",
}  # fmt: skip


def keys(**given: Any) -> dict[str, Any]:
    return translate(SWIFT_SFT, given, "command line").keys


def test_a_command_of_the_guide() -> None:
    assert detect(SFT) is SWIFT_SFT
    assert keys(**SFT) == {
        "model": "qwen-7b-chat", "method": "qlora", "quantization": "nf4", "chat_template": "chatml",
        "model.half_type": "bf16", "output_dir": "output", "data": "blossom-math-zh", "train_sample": 0,
        "val_split": 0.01, "split_seed": 42, "system": "you are a helpful assistant!", "epochs": 1.0,
        "max_length": "2048", "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "lora_layer": ["c_attn"],
        "activation_checkpoint": "full", "batch_size": 1, "eval_batch_size": 1, "weight_decay": "0.01", "lr": 1e-4,
        "gradient_accumulation_steps": "16", "clip_grad": "0.5", "lr_scheduler": "cosine", "min_lr_ratio": 0.0,
        "warmup_iters": 0, "warmup_ratio": 0.03, "eval_iters": 100, "save_iters": 100, "save_total_limit": 2,
        "log_iters": "10", "save_model_only": True, "optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
        "dataloader_num_workers": 1, "seed": 42, "packing": False, "decay_norm_and_bias": False,
        "oversize_rule": "tail", "train_on": "last",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"method": "lora", "lr": 1e-4, "train_sample": 20000, "save_model_only": False, "warmup_ratio": 0.05}),
        ({"sft_type": "full"}, {"method": "full", "lr": 2e-5, "lora_r": None, "save_model_only": True}),
        ({"model_id_or_path": "M"}, {"model": "M", "lora_layer": ["project_q", "project_k", "project_v"]}),
        ({"model_cache_dir": "M", "lora_target_modules": "q_proj v_proj"}, {"lora_layer": ["q_proj", "v_proj"]}),
        ({"dataset_test_ratio": 0}, {"val_split": 0.0, "eval_iters": None, "save_iters": 50}),
        ({"eval_steps": 30}, {"eval_iters": 30, "save_iters": 30}),
        ({"max_steps": 9}, {"train_iters": 9, "epochs": None}),
        ({"batch_size": 4}, {"batch_size": 4, "eval_batch_size": 4}),
        ({"eval_batch_size": 2}, {"batch_size": 1, "eval_batch_size": 2}),
        ({"dataset": ["a", "b"]}, {"data": "a,b"}),
        ({"dataset": "a b"}, {"data": "a,b"}),
        ({"template_type": "default-generation"}, {"chat_template": "none"}),
        ({"template_type": "my-chat"}, {"chat_template": "my-chat"}),
        ({"quantization_bit": 0}, {"method": "lora", "quantization": None}),
        ({"bnb_4bit_use_double_quant": False}, {"double_quant": False}),
        ({"use_flash_attn": False}, {"flash": "none"}),
        ({"save_total_limit": -1}, {"save_total_limit": 0}),
        ({"warmup_steps": 5}, {"warmup_iters": 5, "warmup_ratio": 0.0}),
        ({"dataset_split_seed": 7, "test_oom_error": "true"}, {"split_seed": 7, "test_oom_error": True}),
    ],
)
def test_arguments_that_have_an_effect(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = keys(**given)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sft_type": "longlora"}, "longlora is not supported"),
        ({"template_type": "chatglm2"}, "no ChatGLM2 model"),
        ({"dtype": "fp8"}, "expected one of bf16, fp16, fp32"),
        ({"push_to_hub": "true"}, "fm9g does not upload"),
        ({"predict_with_generate": True}, "fm9g generate"),
        ({"ignore_args_error": True}, "a wrong argument would have no effect"),
        ({"ddp_backend": "mpi"}, "NCCL"),
        ({"ckpt_dir": "output"}, "fm9g convert"),
        ({"merge_lora_and_save": "true"}, "fm9g lora merge"),
        ({"lora_dropout": 0.1}, "did you mean 'lora_dropout_p'"),
    ],
)
def test_what_is_not_supported_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        keys(**given)


@pytest.mark.skipif(not GUIDES, reason="../shared/spec is missing")
def test_every_argument_that_the_guide_lists_has_a_row() -> None:
    text = GUIDES[0].read_text(encoding="utf-8")
    names = set(re.findall(r"^- `--([a-zA-Z0-9_]+)`", text, re.MULTILINE))
    assert len(names) > 50
    assert {name for name in names if SWIFT_SFT.row_of(name) is None} == set()
