from pathlib import Path
from typing import Any

import pytest

from fm9g.config.dialects.llamafactory import LLAMAFACTORY
from fm9g.config.dialects.translate import detect, translate
from fm9g.errors import UserError

# The keys of its documented LoRA example.
LORA_SFT = {
    "model_name_or_path": "M", "trust_remote_code": True, "stage": "sft", "do_train": True, "finetuning_type": "lora",
    "lora_rank": 8, "lora_target": "all", "dataset": "identity,alpaca_en_demo", "template": "llama3",
    "cutoff_len": 2048, "max_samples": 1000, "preprocessing_num_workers": 16, "dataloader_num_workers": 4,
    "output_dir": "saves", "logging_steps": 10, "save_steps": 500, "plot_loss": True, "overwrite_output_dir": True,
    "save_only_model": False, "report_to": "none", "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8, "learning_rate": 1.0e-4, "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000,
    "resume_from_checkpoint": None, "val_size": 0.1, "per_device_eval_batch_size": 2, "eval_strategy": "steps",
    "eval_steps": 200,
}  # fmt: skip
ADAPTERS = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_layer": ["all"]}


def keys(**given: Any) -> dict[str, Any]:
    return translate(LLAMAFACTORY, given, "run.yaml").keys


def test_the_documented_example() -> None:
    assert detect(LORA_SFT) is LLAMAFACTORY
    assert keys(**LORA_SFT) == {
        **ADAPTERS, "model": "M", "method": "lora", "use_rslora": False, "use_dora": False, "loraplus_lr_ratio": 1.0,
        "data": "data/identity,data/alpaca_en_demo", "chat_template": "llama", "max_length": 2048, "max_samples": 1000,
        "dataloader_num_workers": 4, "output_dir": "saves", "overwrite": True, "log_iters": 10, "save_iters": 500,
        "save_model_only": False, "report_to": "none", "batch_size": 1, "eval_batch_size": 2,
        "gradient_accumulation_steps": 8, "lr": 1e-4, "epochs": 3.0, "lr_scheduler": "cosine", "min_lr_ratio": 0.0,
        "warmup_iters": 0, "warmup_ratio": 0.1, "model.half_type": "bf16", "val_split": 0.1, "eval_iters": 200,
        "packing": False, "oversize_rule": "head", "decay_norm_and_bias": False, "train_on": "assistant",
        "activation_checkpoint": "full", "optimizer": "adamw", "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999,
        "eps": 1e-8, "clip_grad": 1.0, "seed": 42,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"method": "lora", "model.half_type": "fp32", "max_length": 2048, "packing": False, **ADAPTERS}),
        ({"finetuning_type": "full", "lora_rank": 64, "lora_target": "q_proj"}, {"method": "full", "lora_r": None}),
        ({"finetuning_type": "freeze"}, {"method": "freeze", "trainable_layers": 2}),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": -3}, {"trainable_layers": -3}),
        ({"quantization_bit": 4}, {"method": "qlora", "quantization": "nf4"}),
        ({"quantization_bit": "4", "quantization_type": "fp4"}, {"method": "qlora", "quantization": "fp4"}),
        ({"quantization_bit": 8, "double_quantization": False}, {"quantization": "int8", "double_quant": False}),
        ({"lora_rank": 16}, {"lora_r": 16, "lora_alpha": 32}),
        ({"lora_alpha": 64, "lora_dropout": 0.1}, {"lora_alpha": 64, "lora_dropout": 0.1}),
        ({"use_dora": True, "use_rslora": "true"}, {"use_dora": True, "use_rslora": True}),
        ({"loraplus_lr_ratio": 16}, {"loraplus_lr_ratio": 16}),
        ({"additional_target": "embed_tokens,lm_head"}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({"pissa_init": True}, {"init_lora_weights": "pissa_niter_16"}),
        ({"pissa_init": True, "pissa_iter": -1}, {"init_lora_weights": "pissa"}),
        ({"stage": "pt"}, {"packing": True}),
        ({"stage": "pt", "packing": False}, {"packing": False}),
        ({"neat_packing": True}, {"packing": True}),
        ({"dataset": ["a", "b"], "dataset_dir": "dir"}, {"data": "dir/a,dir/b"}),
        ({"dataset": "org/name", "dataset_dir": "ONLINE"}, {"data": "org/name"}),
        ({"val_size": 100, "eval_strategy": "epoch"}, {"val_sample": 100, "val_split": None, "eval_iters": 1 / 3}),
        ({"eval_dataset": "v", "eval_strategy": "steps"}, {"val_data": "data/v", "eval_iters": 500}),
        ({"val_size": 0.1, "eval_strategy": False}, {"val_split": 0.1, "eval_iters": 2**31 - 1}),  # YAML's no
        ({"save_strategy": False}, {"save": False, "save_iters": None}),
        ({"train_on_prompt": True}, {"train_on": "all"}),
        ({"mask_history": True}, {"train_on": "last"}),
        ({"template": "qwen"}, {"chat_template": "qwen"}),
        ({"template": "no_such_family"}, {"chat_template": "tokenizer"}),
        ({"default_system": "S"}, {"system": "S"}),
        ({"use_muon": True}, {"optimizer": "muon"}),
        ({"use_muon": False, "optim": "adafactor"}, {"optimizer": "adafactor"}),
        ({"use_swanlab": False, "report_to": "wandb"}, {"report_to": "wandb"}),
        ({"use_swanlab": True}, {"report_to": "swanlab"}),
        ({"use_swanlab": True, "report_to": ["wandb"]}, {"report_to": "wandb,swanlab"}),
        ({"disable_gradient_checkpointing": True}, {"activation_checkpoint": "none"}),
        ({"flash_attn": "fa2"}, {"flash": "cuda"}),
        ({"flash_attn": "disabled"}, {"flash": "none"}),
        ({"adapter_name_or_path": "A"}, {"adapter": "A"}),
        ({"early_stopping_steps": 3}, {"early_stopping_patience": 3}),
        ({"mix_strategy": "concat"}, {"data": None}),
    ],
)
def test_arguments_that_have_an_effect(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = keys(**given)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stage": "dpo"}, "dpo is not supported"),
        ({"finetuning_type": "oft"}, "oft is not supported"),
        ({"finetuning_type": "full", "quantization_bit": 4}, "is trained by lora"),
        ({"quantization_bit": 3}, "expected 4, 8 or none"),
        ({"quantization_method": "hqq"}, "bitsandbytes"),
        ({"mask_history": True, "train_on_prompt": True}, "contradicts train_on_prompt"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, "0 layers are trained"),
        ({"finetuning_type": "freeze", "freeze_trainable_modules": "mlp"}, "whole layers are trained"),
        ({"finetuning_type": "freeze", "freeze_extra_modules": "norm"}, "the layers alone are trained"),
        ({"mix_strategy": "interleave_over"}, "write shares behind the names"),
        ({"interleave_probs": "0.7,0.3"}, "write shares behind the names"),
        ({"add_tokens": "<a>,<b>"}, "write the tokens into a file"),
        ({"rope_scaling": "yarn"}, "model.rope_scaling_type yarn"),
        ({"use_galore": True}, "GaLore is not supported"),
        ({"pissa_init": True, "pissa_iter": 4}, "pissa_iter: found 4, expected 16, or -1"),
        ({"use_muon": "maybe"}, "found 'maybe', expected true or false$"),
        ({"optim": "lomo"}, "optim: found 'lomo'"),
        ({"lora_rnak": 8}, "did you mean 'lora_rank'"),
    ],
)
def test_what_is_not_supported_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        keys(**given)


def test_a_registered_name_is_not_a_path_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("registered", "plain", "data"):
        Path(folder).mkdir()
    Path("data/dataset_info.json").write_text('{"registered": {"file_name": "r.json"}}')
    assert keys(dataset="registered,plain", dataset_dir="data")["data"] == "data/registered,plain"


# What a refused argument may say, since nothing is asked then.
@pytest.mark.parametrize(
    "name",
    ["use_galore", "use_apollo", "use_badam", "use_adam_mini", "shift_attn", "pure_bf16", "predict_with_generate",
     "train_from_scratch", "create_new_adapter", "use_llama_pro", "mixture_of_depths", "disable_shuffling", "fp8"],
)  # fmt: skip
def test_false_is_harmless(name: str) -> None:
    assert keys(**{name: False}) == keys()
    with pytest.raises(UserError, match=name):
        keys(**{name: True})
