from typing import Any

import pytest

from fm9g.config.dialects.console import CONSOLE
from fm9g.config.dialects.translate import detect, translate
from fm9g.errors import UserError

FORM = {
    "实验名称": "exp", "部署位置": "本地", "基础模型": "M", "提示词模版": "qwen", "微调方法": "lora", "训练阶段": "sft",
    "训练数据集": "d.jsonl", "任务名称": "task", "算力类型": "GPU", "资源配置": "A100", "任务并行数": 1, "物理卡数": 2,
    "学习率": "5e-5", "训练轮数": 3, "最大梯度范数": 1.0, "最大样本数": 1000, "计算类型": "bf16", "截断长度": 1024,
    "批处理大小": 2, "梯度累计": 8, "验证集比例": 0.1, "学习率调节器": "cosine", "LoRA秩": 8, "LoRA缩放系数": 32,
    "LoRA随机丢弃": 0.1, "LoRA学习率比例": 16, "量化等级": "none", "量化方法": "bitsandbytes", "加速方式": "auto",
    "日志间隔": 5, "保存间隔": 100, "预热步数": 10, "NEFTune噪声参数": 5, "优化器": "adamw_torch",
}  # fmt: skip


def keys(**given: Any) -> dict[str, Any]:
    return translate(CONSOLE, given, "form.yaml").keys


def test_the_form_by_its_labels() -> None:
    assert detect(FORM) is CONSOLE
    found = keys(**FORM)
    assert found == {
        "exp_group": "exp", "model": "M", "chat_template": "qwen", "method": "lora", "data": "d.jsonl",
        "model_unique": "task", "n_gpus": 2, "lr": "5e-5", "epochs": 3, "clip_grad": 1.0, "max_samples": 1000,
        "model.half_type": "bf16", "max_length": 1024, "batch_size": 2, "gradient_accumulation_steps": 8,
        "val_split": 0.1, "lr_scheduler": "cosine", "min_lr_ratio": 0.0, "lora_r": 8, "lora_alpha": 32,
        "lora_dropout": 0.1, "loraplus_lr_ratio": 16, "flash": "cuda", "log_iters": 5, "save_iters": 100,
        "warmup_iters": 10, "warmup_ratio": 0.0, "neftune_alpha": 5, "optimizer": "adamw", "weight_decay": 0.0,
        "beta2": 0.999, "eps": 1e-8, "packing": False, "oversize_rule": "head", "decay_norm_and_bias": False,
    }  # fmt: skip
    names = {row.label: row.name for row in CONSOLE.rows}
    assert keys(**{names[label]: value for label, value in FORM.items()}) == found


def test_every_label_of_the_form_is_tested() -> None:
    labels = {row.label for row in CONSOLE.rows if row.label}
    assert labels - FORM.keys() == {"RoPE插值方式"}  # it is refused


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"finetuning_type": "full", "lora_rank": 8}, {"method": "full", "lora_r": None}),
        ({"quantization_bit": 4}, {"method": "qlora", "quantization": "nf4"}),
        ({"stage": "pt"}, {"packing": True}),
        ({"flash_attn": "flashattention2"}, {"flash": "cuda"}),
        ({"flash_attn": "unsloth"}, {"flash": "cuda"}),
        ({"lora_rank": 4}, {"lora_r": 4, "lora_alpha": 8}),
        ({"weight_decay": 0.1, "adam_beta2": 0.95}, {"weight_decay": 0.1, "beta2": 0.95}),
        ({"output_dir": "out", "adam_epsilon": 1e-6}, {"output_dir": "out", "eps": 1e-6}),
    ],
)
def test_arguments_that_have_an_effect(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = keys(**given)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"训练阶段": "dpo"}, "dpo is not supported"),
        ({"量化方法": "hqq"}, "量化方法: hqq and eetq are not supported"),
        ({"rope_scaling": "linear"}, "model.rope_scaling_type"),
        ({"计算类型": "int8"}, "expected one of bf16"),
        ({"学习率率": 1}, "did you mean '学习率'"),
    ],
)
def test_what_is_not_supported_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        keys(**given)
