"""The form of a finetuning platform: its fields, by their English names or by the labels that the form has."""

from __future__ import annotations

from fm9g.config.dialects import rules
from fm9g.config.dialects.conversions import attention, dtype, optimizer
from fm9g.config.dialects.llamafactory import TEMPLATES
from fm9g.config.dialects.table import UNSET, Dialect, Given, Keys, Row
from fm9g.config.dialects.transformers import TRAINER

_PLATFORM = "the platform places the job"


def field(name: str, label: str, ours: str = "", **words: object) -> Row:
    """A row whose label is another name of it."""
    return Row(name, ours, aliases=(label,), label=label, **words)  # type: ignore[arg-type]


def method(given: Given) -> Keys:
    """finetuning_type and quantization_bit: a model in 4 or 8 bits is trained by QLoRA."""
    return rules.tuner(given)


def adapters(given: Given) -> Keys:
    """Rank, scale and dropout of the adapters. With full finetuning they have no effect."""
    if rules.tuner(given)["method"] not in rules.ADAPTER_METHODS:
        return {}
    rank = int(given.number("lora_rank") or 8)
    return {
        "lora_r": rank,
        "lora_alpha": given.number("lora_alpha") or 2 * rank,
        "lora_dropout": given.number("lora_dropout") or 0.0,
        "loraplus_lr_ratio": given.number("loraplus_lr_ratio") or 1.0,
    }


def stage(given: Given) -> Keys:
    """The stage: text alone fills rows, as in LLaMA-Factory."""
    name = given.choice("stage", "sft", "pt", "rm", "ppo", "dpo", "kto")
    if name not in ("", "sft", "pt"):
        raise given.error("stage", f"{name} is not supported; sft and pt are")
    return {"packing": name == "pt"}


def template(given: Given) -> Keys:
    """The chat template; the tokenizer's own if it is none of the built-in ones."""
    name = given.text("template")
    return {"chat_template": TEMPLATES.get(name, "tokenizer")} if name else {}


def acceleration(value: object) -> str:
    """The attention kernel."""
    return (
        "cuda"
        if str(value).lower() in ("unsloth", "auto")
        else attention(str(value).lower().replace("flashattention2", "fa2"))
    )


CONSOLE = Dialect(
    "console",
    "the form of a finetuning platform",
    (
        field("experiment_name", "实验名称", "exp_group"),
        field("location", "部署位置", ignored=_PLATFORM),
        field("base_model", "基础模型", "model"),
        field("template", "提示词模版", rule=template),
        field("finetuning_type", "微调方法", rule=method, default="lora"),
        field("stage", "训练阶段", rule=stage, default="sft"),
        field("dataset", "训练数据集", "data"),
        field("task_name", "任务名称", "model_unique"),
        field("resource_type", "算力类型", ignored=_PLATFORM),
        field("resources", "资源配置", ignored=_PLATFORM),
        field("num_nodes", "任务并行数", ignored="write --nnodes behind `fm9g train`"),
        field("gpus_per_node", "物理卡数", "n_gpus"),
        field("learning_rate", "学习率", "lr", default=5e-5),
        field("num_train_epochs", "训练轮数", "epochs", default=3.0),
        field("max_grad_norm", "最大梯度范数", "clip_grad", default=1.0),
        field("max_samples", "最大样本数", "max_samples"),
        field("compute_type", "计算类型", "model.half_type", convert=dtype),
        field("cutoff_len", "截断长度", "max_length", default=2048),
        field("batch_size", "批处理大小", "batch_size", default=8),
        field("gradient_accumulation_steps", "梯度累计", "gradient_accumulation_steps", default=1),
        field("val_size", "验证集比例", "val_split"),
        field("lr_scheduler_type", "学习率调节器", rule=rules.schedule, default="cosine"),
        field("lora_rank", "LoRA秩", rule=adapters, default=8),
        field("lora_alpha", "LoRA缩放系数", rule=adapters, default=UNSET),
        field("lora_dropout", "LoRA随机丢弃", rule=adapters, default=0.0),
        field("loraplus_lr_ratio", "LoRA学习率比例", rule=adapters,
              note="the rate of the adapters' B divided by that of their A (LoRA+)"),
        field("quantization_bit", "量化等级", rule=method),
        field("quantization_method", "量化方法",
              refused="hqq and eetq are not supported; write bnb", harmless=("bnb", "bitsandbytes")),
        field("rope_scaling", "RoPE插值方式",
              refused="write model.rope_scaling_type and model.rope_scaling_factor"),
        field("flash_attn", "加速方式", "flash", convert=acceleration),
        field("logging_steps", "日志间隔", "log_iters", default=5),
        field("save_steps", "保存间隔", "save_iters", default=100),
        field("warmup_steps", "预热步数", rule=rules.warmup, default=0),
        field("neftune_noise_alpha", "NEFTune噪声参数", "neftune_alpha"),
        field("optim", "优化器", "optimizer", convert=optimizer, default="adamw_torch"),
        Row("weight_decay", "weight_decay", default=0.0),
        Row("adam_beta2", "beta2", default=0.999),
        Row("adam_epsilon", "eps", default=1e-8),
        Row("output_dir", "output_dir"),
    ),
    constants=TRAINER,
    distinctive=("base_model", "基础模型", "任务名称", "训练数据集"),
)  # fmt: skip
