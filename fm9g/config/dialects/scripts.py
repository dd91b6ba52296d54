"""Training scripts that are built on transformers: the job templates of platforms, QLoRA and full tuning from one JSON
of arguments, and the published 9G variant for Hugging Face.
"""

from __future__ import annotations

from fm9g.config.dialects import rules
from fm9g.config.dialects.conversions import attention, truth
from fm9g.config.dialects.table import Dialect, Given, Keys, Row, extend
from fm9g.config.dialects.transformers import TRAINER, TRAINING_ARGUMENTS

_TEMPLATES = "the chat template of the tokenizer is used; give chat_template for another one"


def json_method(given: Given) -> Keys:
    """train_mode; without it, a JSON with lora_rank is for the QLoRA script, another one for full finetuning."""
    keys = rules.tuner(given)
    return {"method": "qlora"} if "train_mode" not in given.given and "lora_rank" in given.given else keys


_SIZES = {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_JSON_ADAPTERS = rules.adapter_rule(json_method, {"lora_r": "lora_rank", **_SIZES})
_9G_ADAPTERS = rules.adapter_rule(rules.tuner, {"lora_r": "lora_r", "lora_layer": "lora_modules", **_SIZES})

# One JSON of arguments, as train.py and train_qlora.py of Firefly and its descendants read it. The names that their
# guides misspell are aliases.
FINETUNE_JSON = Dialect(
    "finetune-json",
    "a JSON of training arguments (Firefly)",
    extend(
        TRAINING_ARGUMENTS,
        Row("train_args_file", ignored="the arguments are in this file"),
        Row("model_name_or_path", "model", aliases=("module_name_or_path",)),
        Row("train_file", rule=rules.data),
        Row("eval_file", rule=rules.evaluation),
        Row("max_seq_length", "max_length", default=2048, aliases=("max_seq_len",)),
        Row("train_mode", rule=json_method, aliases=("finetuning_type",)),
        Row("use_qlora", rule=json_method),
        Row("use_lora", rule=json_method),
        Row("q_lora", rule=json_method),
        Row("lora_rank", rule=_JSON_ADAPTERS, default=64),
        Row("lora_alpha", rule=_JSON_ADAPTERS, default=16),
        Row("lora_dropout", rule=_JSON_ADAPTERS, default=0.05),
        Row("task_type", refused="records are finetuned or pretrained as they are; write sft or pretrain",
            harmless=("sft", "pretrain")),
        Row("template_name", ignored=_TEMPLATES),
        Row("template_file", "chat_template"),
        Row("tokenize_num_workers", ignored="records are encoded while the run reads them"),
        Row("max_prompt_length", ignored="it is for DPO"),
        Row("beta", ignored="it is for DPO"),
        Row("use_unsloth", ignored="kernels are chosen for the machine"),
        Row("attn_implementation", "flash", attention),
        Row("per_device_train_batch_size", "batch_size", default=8, aliases=("pre_device_train_batch_size",)),
        Row("gradient_accumulation_steps", "gradient_accumulation_steps", default=1,
            aliases=("gradient_accumulation_step",)),
        Row("dataloader_num_workers", "dataloader_num_workers",
            aliases=("dataloder_num_workers", "dataloder_num_worker", "dataloader_num_worker")),
        Row("save_steps", rule=rules.saving, default=500, aliases=("save_step",)),
        Row("logging_steps", rule=rules.logging, default=500, aliases=("logging", "logging_step")),
        Row("optim", next(row.ours for row in TRAINING_ARGUMENTS if row.name == "optim"),
            next(row.convert for row in TRAINING_ARGUMENTS if row.name == "optim"), default="paged_adamw_32bit"),
    ),
    constants=TRAINER,
    file_argument="train_args_file",
    distinctive=("train_args_file", "max_seq_length", "lora_rank", "train_mode", "template_name"),
)  # fmt: skip

# The published 9G variant for Hugging Face, which descends from MiniCPM's finetune.py.
NINE_G_HF = Dialect(
    "9g-hf",
    "the 9G scripts for Hugging Face",
    extend(
        TRAINING_ARGUMENTS,
        Row("model_name_or_path", "model"),
        Row("tokenizer_path", "tokenizer_path"),
        Row("train_data_config_path", rule=rules.data),
        Row("train_data_path", rule=rules.data),
        Row("eval_data_path", rule=rules.evaluation),
        Row("cache_dir", ignored="hub names are found in the cache of the hub"),
        Row("model_max_length", "max_length", default=512, aliases=("max_length",)),
        Row("use_lora", rule=rules.tuner),
        Row("qlora", rule=rules.tuner),
        Row(
            "lora_modules",
            rule=_9G_ADAPTERS,
            default=["q_proj", "v_proj", "k_proj", "o_proj"],
            note="the adapters' A starts from a uniform distribution, as in PEFT; there from a Gaussian one",
        ),
        Row("lora_r", rule=_9G_ADAPTERS, default=64),
        Row("lora_alpha", rule=_9G_ADAPTERS, default=32),
        Row("lora_dropout", rule=_9G_ADAPTERS, default=0.1),
    ),
    constants=TRAINER,
    distinctive=("train_data_config_path", "qlora", "lora_modules"),
)

# The parameters of a finetuning job on a platform; labels as its form has them.


def job_data(given: Given) -> Keys:
    """The file of the job, or else its address."""
    files = given.first("DataPath", "FileUrl")
    return {"data": files} if files else {}


_STARTED = "the platform starts the job"
JOB = Dialect(
    "job",
    "the parameters of a finetuning job",
    (
        Row("JobId", ignored=_STARTED, label="任务ID"),
        Row("FineTunedModel", "model_unique", label="微调模型"),
        Row("FileId", ignored=_STARTED, label="文件ID"),
        Row("BaseModel", ignored="BaseModelPath is the model", label="基础模型名称"),
        Row("BaseModelPath", "model", label="基础模型路径"),
        Row("TrainBatchSize", "batch_size", default=1, label="训练批次大小"),
        Row("EvalBatchSize", "eval_batch_size", default=1, label="评估批次大小"),
        Row("AccumulationSteps", "gradient_accumulation_steps", default=1, label="梯度累加步数"),
        Row("TrainEpoch", "epochs", default=1, label="训练轮次"),
        Row("ProcPerNode", "n_gpus", default=1, label="每个节点使用的GPU数量"),
        Row("EvalSteps", "eval_iters", label="评估步数"),
        Row("SaveSteps", "save_iters", label="保存步数"),
        Row("SaveTotalLimit", "save_total_limit", default=8, label="保存总数限制"),
        Row("LearningRate", "lr", default=2e-5, label="学习率"),
        Row("WeightDecay", "weight_decay", default=0.0, label="权重衰减"),
        Row("WarmupRatio", "warmup_ratio", default=0.04, label="预热比例"),
        Row("LoggingSteps", "log_iters", default=1, label="日志步数"),
        Row("ModelMaxLength", "max_length", default=2048, label="模型最大长度"),
        Row("Lora", "method", lambda value: "lora" if truth(value) else "full", default=False, label="是否微调LoRA"),
        Row("DataPath", rule=job_data, label="数据集文件地址"),
        Row("FileUrl", rule=job_data, label="文件的远程URL地址"),
        Row("ValidationFile", "val_data", label="验证文件"),
        Row("OutputDir", "output_dir", label="输出目录"),
        Row("ScriptFile", ignored="the script is `fm9g train`", label="脚本文件"),
        Row("TrainScript", ignored="the script is `fm9g train`", label="训练脚本内容"),
        Row("MasterPort", ignored="write --master-port behind `fm9g train`", label="master端口"),
        Row("report_to", rule=rules.report_to, default="none"),
    ),
    # What the script of the job template says.
    constants={
        **TRAINER,
        "model.half_type": "bf16",
        "lr_scheduler": "cosine",
        "min_lr_ratio": 0.0,
        "warmup_iters": 0,
        "beta2": 0.95,
        "eps": 1e-8,
        "activation_checkpoint": "full",
        "seed": 42,
    },
    distinctive=("JobId", "TrainBatchSize", "BaseModelPath"),
)
