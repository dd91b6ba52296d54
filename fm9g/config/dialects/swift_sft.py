"""ms-swift of 2023: the arguments of its scripts sft.sh and infer.sh, with the defaults of that time."""

from __future__ import annotations

from fm9g.config.dialects import rules
from fm9g.config.dialects.conversions import checkpointing, comma_list, layers, no_limit, optimizer, truth
from fm9g.config.dialects.deepspeed import deepspeed_file
from fm9g.config.dialects.llamafactory import unused
from fm9g.config.dialects.table import Dialect, Given, Keys, Row
from fm9g.config.dialects.transformers import TRAINER, TRAINING_ARGUMENTS

_HUB = "fm9g does not upload; `fm9g convert` writes a folder to upload"
_GENERATED = "an evaluation computes the loss; `fm9g generate` continues a prompt"
_INFERENCE = "it is for inference; `fm9g chat` and `fm9g generate` take it, with --from swift-sft"
_QKV = ["project_q", "project_k", "project_v"]  # lora_TM of most models there


def model(given: Given) -> Keys:
    """model_type is a registered name; a folder given as model_id_or_path or model_cache_dir takes its place."""
    name = given.first("model_id_or_path", "model_cache_dir") or given.text("model_type")
    return {"model": name}


def method(given: Given) -> Keys:
    """sft_type and quantization_bit, and the learning rate that the method has unless one is given."""
    keys = rules.tuner(given)
    rate = given.number("learning_rate")
    keys["lr"] = rate if rate is not None else 2e-5 if keys["method"] == "full" else 1e-4
    return keys


def adapters(given: Given) -> Keys:
    """Layers, rank and scale of the adapters. With sft_type full they have no effect, as there."""
    if rules.tuner(given)["method"] == "full":
        return {}
    named = given["lora_target_modules"]
    keys: Keys = {"lora_layer": layers(named)} if named else {}
    if not named and given.first("model_id_or_path", "model_cache_dir"):
        keys["lora_layer"] = _QKV  # a model that is registered has its own
    return keys | {
        "lora_r": int(given.number("lora_rank") or 8),
        "lora_alpha": given.number("lora_alpha") or 32,
        "lora_dropout": given.number("lora_dropout_p") or 0.0,
    }


def evaluation(given: Given) -> Keys:
    """dataset_test_ratio, eval_steps, and save_steps, which is eval_steps unless it is given."""
    ratio, steps = given.number("dataset_test_ratio") or 0.0, given.number("eval_steps") or 50
    keys: Keys = {"val_split": ratio, "save_iters": given.number("save_steps") or steps}
    return keys | {"eval_iters": steps} if ratio else keys


def sample(given: Given) -> Keys:
    """train_dataset_sample: a negative number means all records."""
    return {"train_sample": max(0, int(given.number("train_dataset_sample") or 0))}


def saving(given: Given) -> Keys:
    """only_save_model: by default for all runs but LoRA without DeepSpeed."""
    only = given["only_save_model"]
    if only is None:
        only = rules.tuner(given)["method"] == "full" or bool(given["deepspeed_config_path"])
    return {"save_model_only": truth(only)}


def precision(given: Given) -> Keys:
    """dtype of the model."""
    return {"model.half_type": given.choice("dtype", "bf16", "fp16", "fp32")}


def batch(given: Given) -> Keys:
    """Samples per micro-batch of training and evaluation."""
    size = int(given.number("batch_size") or 1)
    return {"batch_size": size, "packing": False, "eval_batch_size": int(given.number("eval_batch_size") or size)}


# Templates of that time -> ours; the other ones are registered under their names.
_TEMPLATES = {
    "default": "swift-default",
    "default-generation": "none",
    "baichuan": "swift-baichuan",
    "llama": "swift-llama",
    "openbuddy-llama": "swift-openbuddy-llama",
    "openbuddy_llama": "swift-openbuddy-llama",
    "internlm": "swift-internlm",
    "xverse": "swift-xverse",
}


def template(value: object) -> str:
    """template_type: a template of that time, or a registered one."""
    if str(value) in ("chatglm2", "chatglm2-generation"):
        raise ValueError("fm9g has no ChatGLM2 model; expected chatml, default, llama or another one")
    return _TEMPLATES.get(str(value), str(value))


ROWS = (
    Row("model_type", rule=model, default="qwen-7b-chat"),
    Row("model_id_or_path", rule=model),
    Row("model_cache_dir", rule=model),
    Row("sft_type", rule=method, default="lora"),
    Row("tuner_bankend", refused="adapters are inserted by PEFT, which computes the same; leave it out",
        harmless=("swift", "peft"), aliases=("tuner_backend",)),
    Row("template_type", "chat_template", template),
    Row("output_dir", "output_dir", default="output", note="checkpoints are in output_dir/checkpoints/RUN"),
    Row("ddp_backend", refused="the engine chooses NCCL on GPUs and gloo on CPUs", harmless=("nccl", "gloo")),
    Row("seed", "seed", default=42, note="the same on all ranks; dropout differs all the same"),
    Row("resume_from_checkpoint", next(row.ours for row in TRAINING_ARGUMENTS if row.name == "resume_from_checkpoint"),
        next(row.convert for row in TRAINING_ARGUMENTS if row.name == "resume_from_checkpoint")),
    Row("dtype", rule=precision, default="bf16"),
    Row("ignore_args_error", refused="a wrong argument would have no effect, unseen", harmless=(False,)),
    Row("dataset", "data", comma_list, default="blossom-math-zh"),
    Row("dataset_split_seed", "split_seed", default=42),
    Row("dataset_test_ratio", rule=evaluation, default=0.01),
    Row("train_dataset_sample", rule=sample, default=20000),
    Row("system", "system", default="you are a helpful assistant!"),
    Row("max_length", "max_length", default=2048),
    Row("quantization_bit", rule=method, default=0),
    Row("bnb_4bit_comp_dtype", ignored="layers are computed in dtype"),
    Row("bnb_4bit_quant_type", rule=method, default="nf4"),
    Row("bnb_4bit_use_double_quant", "double_quant", truth),
    Row("lora_target_modules", rule=adapters),
    Row("lora_rank", rule=adapters, default=8),
    Row("lora_alpha", rule=adapters, default=32),
    Row("lora_dropout_p", rule=adapters, default=0.0),
    Row("gradient_checkpointing", "activation_checkpoint", checkpointing, default=False),
    Row("deepspeed_config_path", rule=deepspeed_file),
    Row("batch_size", rule=batch, default=1),
    Row("eval_batch_size", rule=batch),
    Row("num_train_epochs", rule=rules.training_length, default=1),
    Row("max_steps", rule=rules.training_length, default=-1),
    Row("optim", "optimizer", optimizer, default="adamw_torch"),
    Row("adam_beta1", "beta1", default=0.9),
    Row("adam_beta2", "beta2", default=0.999),
    Row("adam_epsilon", "eps", default=1e-8),
    Row("learning_rate", rule=method),
    Row("weight_decay", "weight_decay", default=0.01, note="acts on matrices alone: decay_norm_and_bias is false"),
    Row("gradient_accumulation_steps", "gradient_accumulation_steps", default=16),
    Row("max_grad_norm", "clip_grad", default=1.0),
    Row("predict_with_generate", refused=_GENERATED, harmless=(False,)),
    Row("lr_scheduler_type", rule=rules.schedule, default="cosine"),
    Row("warmup_ratio", rule=rules.warmup, default=0.05),
    Row("warmup_steps", rule=rules.warmup),
    Row("eval_steps", rule=evaluation, default=50),
    Row("save_steps", rule=evaluation),
    Row("only_save_model", rule=saving),
    Row("save_total_limit", "save_total_limit", no_limit, default=2),
    Row("logging_steps", "log_iters", default=5),
    Row("dataloader_num_workers", "dataloader_num_workers", default=1),
    Row("push_to_hub", refused=_HUB, harmless=(False,)),
    *unused("it is for push_to_hub", "hub_model_id", "hub_private_repo", "push_hub_strategy", "hub_token"),
    Row("test_oom_error", "test_oom_error", truth),
    Row("use_flash_attn", "flash", lambda value: "cuda" if truth(value) else "none"),
    *unused(_INFERENCE, "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"),
    # infer.sh
    Row("ckpt_dir", refused="`fm9g chat --from swift-sft` and `generate` use a checkpoint; `fm9g convert` exports it"),
    Row("eval_human", refused="it is for `fm9g chat --from swift-sft` and `generate`", harmless=(False,)),
    *unused(_INFERENCE, "use_streamer", "show_dataset_sample", "save_generation_config"),
    Row("merge_lora_and_save", refused="`fm9g lora merge BASE ADAPTER FOLDER` does that", harmless=(False,)),
)  # fmt: skip
SWIFT_SFT = Dialect(
    "swift-sft",
    "ms-swift of 2023 (sft.sh)",
    ROWS,
    # Longer samples lose their beginning; the last answer alone has a loss.
    constants={**TRAINER, "oversize_rule": "tail", "train_on": "last"},
    distinctive=(
        "sft_type",
        "tuner_bankend",
        "train_dataset_sample",
        "dataset_test_ratio",
        "template_type",
        "lora_dropout_p",
    ),
)
