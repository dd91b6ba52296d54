"""ms-swift 4.6: the arguments of `swift sft` and `swift pt`, which extend those of transformers."""

from __future__ import annotations

from dataclasses import replace

from fm9g.config.dialects import rules
from fm9g.config.dialects.conversions import attention, checkpointing, layers, optimizer, truth
from fm9g.config.dialects.llamafactory import refused, unused
from fm9g.config.dialects.table import UNSET, Dialect, Given, Keys, Row, extend
from fm9g.config.dialects.transformers import TRAINER, TRAINING_ARGUMENTS
from fm9g.config.registry import registered_names

_TEXT_ONLY = "fm9g trains on text"
_INFERENCE = "it is for inference; `fm9g chat`, `generate` and `serve` take it, with --from swift"
_LOADER = "records are indexed once, and encoded while the run reads them"
_TUNER = "adapters are LoRA, rsLoRA, DoRA and PiSSA here"
_LR_FULL, _LR_ADAPTERS = 1e-5, 1e-4
_STEP_SAMPLES = 16  # samples per step unless gradient_accumulation_steps is given


def learning_rate(given: Given) -> Keys:
    """learning_rate; its default depends on what is trained."""
    rate = given.number("learning_rate")
    is_full = rules.tuner(given)["method"] == "full"
    return {"lr": rate if rate is not None else _LR_FULL if is_full else _LR_ADAPTERS}


def batch(given: Given) -> Keys:
    """Samples per micro-batch, and micro-batches per step; by default a step has 16 samples."""
    size = int(given.number("per_device_train_batch_size") or 1)
    steps = given.number("gradient_accumulation_steps")
    if steps is not None:
        return {"batch_size": size, "gradient_accumulation_steps": int(steps)}
    return {"batch_size": size, "global_batch_size": max(1, -(-_STEP_SAMPLES // size))}


def adapters(given: Given) -> Keys:
    """Layers, rank, scale and kind of the adapters. Without adapters these arguments have no effect, as there."""
    if rules.tuner(given)["method"] not in ("lora", "qlora"):
        return {}
    initial = given.text("init_weights").lower() or "true"
    if initial not in ("true", "pissa", "pissa_niter_16"):
        raise given.error("init_weights", f"{initial} is not supported: {_TUNER}")
    keys: Keys = {
        "lora_layer": layers(given["target_modules"] or "all-linear"),
        "lora_r": int(given.number("lora_rank") or 8),
        "lora_alpha": given.number("lora_alpha") or 32.0,
        "lora_dropout": given.number("lora_dropout") or 0.0,
        "use_rslora": given.flag("use_rslora"),
        "use_dora": given.flag("use_dora"),
        "loraplus_lr_ratio": given.number("lorap_lr_ratio") or 1.0,
        "init_lora_weights": "default" if initial == "true" else initial,
    }
    if given["modules_to_save"]:
        keys["modules_to_save"] = layers(given["modules_to_save"])
        if keys["loraplus_lr_ratio"] != 1.0:
            given.notes.append("lorap_lr_ratio: modules_to_save have the learning rate here, 1e-6 there")
    return keys


def length(given: Given) -> Keys:
    """max_length, and what becomes of longer records."""
    rule = {"": "drop", "delete": "drop", "right": "head", "left": "tail", "split": "segment", "raise": "drop"}
    strategy = given.choice("truncation_strategy", *filter(None, rule))
    keys: Keys = {"oversize_rule": rule[strategy]}
    if strategy == "raise":
        given.notes.append("truncation_strategy raise: longer records are left out and counted")
    if (limit := given.number("max_length")) is not None:
        keys["max_length"] = int(limit)
    return keys


def loss(given: Given) -> Keys:
    """loss_scale: which text has a loss."""
    names = {"": "assistant", "default": "assistant", "last_round": "last", "all": "all"}
    scale = given.text("loss_scale")
    if scale not in names:
        known = ", ".join(filter(None, names))
        raise given.error(
            "loss_scale", f"found {scale!r}, expected one of {known}; records may have weights of their own"
        )
    return {"train_on": names[scale]}


def template(given: Given) -> Keys:
    """The chat template, which only `swift pt` leaves out."""
    if given["use_chat_template"] is False:
        return {"chat_template": "none"}
    name = given.text("template")
    if name in registered_names("templates"):
        return {"chat_template": name}
    if name:
        given.notes.append(f"template {name}: the chat template of the model's tokenizer is used")
        return {"chat_template": "tokenizer"}
    return {}


def evaluation(given: Given) -> Keys:
    """The data to evaluate on, and how often: by default whenever a checkpoint is saved."""
    values = dict(given.values)
    for name, default in (("eval_strategy", "save_strategy"), ("eval_steps", "save_steps")):
        if given[name] is None:
            values[name] = given.values[default]
    if given.choice("eval_strategy", *rules.STRATEGIES) == "no":
        values.pop("split_dataset_ratio", None)  # no record is set aside then
    return rules.evaluation(replace(given, values=values))


def report_to(given: Given) -> Keys:
    """The trackers; TensorBoard unless others, or none, are given."""
    return rules.report_to(given) if "report_to" in given.given else {"report_to": "tensorboard"}


def datasets(given: Given) -> Keys:
    """dataset: names, paths and hub names with :subset and #number."""
    value = given["dataset"]
    names = value if isinstance(value, list) else str(value or "").replace(",", " ").split()
    return {"data": ",".join(map(str, names))} if names else {}


ROWS = extend(
    TRAINING_ARGUMENTS,
    # model
    Row("model", "model", aliases=("model_id_or_path",)),
    Row("model_type", ignored="the folder of the model says what it is"),
    Row("adapters", "adapter", lambda value: str(value[0] if isinstance(value, list) else value),
        aliases=("resume_from_adapter",)),
    Row("torch_dtype", rule=rules.precision, aliases=("dtype",)),
    Row("attn_impl", "flash", attention),
    Row("new_special_tokens", refused="write the tokens into a file, one per line, and give it as new_tokens",
        harmless=([],)),
    Row("rope_scaling", refused="write model.rope_scaling_type and model.rope_scaling_factor"),
    Row("max_model_len", ignored="max_length is the length of a sample"),
    Row("model_revision", refused="a hub name is the revision that was downloaded", harmless=("master", "main")),
    *unused("the engine places the weights", "device_map", "max_memory", "ddp_device_map"),
    *unused("9G models have no experts", "experts_impl", "router_aux_loss_coef"),
    *unused("the cache of each hub is searched", "use_hf", "local_repo_path", "model_kwargs", "hub_token",
            "check_model", "enable_npu_model_patch"),
    Row("task_type", refused="models continue texts; write causal_lm", harmless=("causal_lm",)),
    *refused("models continue texts", "num_labels", "problem_type"),
    Row("init_strategy", refused="weights that a model lacks are not made up; strict_state_dict false allows it"),
    # data
    Row("dataset", rule=datasets),
    Row("val_dataset", rule=evaluation),
    Row("split_dataset_ratio", rule=evaluation),
    Row("eval_steps", rule=evaluation),
    Row("data_seed", "split_seed", default=42),
    Row("eval_strategy", rule=evaluation, aliases=("evaluation_strategy",)),
    Row("cached_dataset", refused="records are indexed once; give the files as dataset", harmless=([],)),
    Row("cached_val_dataset", refused="records are indexed once; give the files as val_dataset", harmless=([],)),
    Row("columns", refused="`fm9g data index --columns` takes them; give its folder as dataset"),
    Row("custom_dataset_info", refused="write the datasets into registry.yaml", harmless=([],)),
    Row("interleave_prob", refused="write shares behind the names: --data NAME:0.7,NAME:0.3"),
    Row("stopping_strategy", ignored="it is for interleave_prob"),
    *unused(_LOADER, "dataset_num_proc", "load_from_cache_file", "streaming", "shuffle_buffer_size", "download_mode",
            "strict", "lazy_tokenize", "packing_num_proc", "load_data_args", "load_args"),
    Row("dataset_shuffle", refused="samples are drawn at random", harmless=(True,)),
    Row("train_dataloader_shuffle", refused="samples are drawn at random", harmless=(True,)),
    *unused("the order of an evaluation does not matter", "val_dataset_shuffle"),
    *unused("keys are recognized by their names", "disable_auto_column_mapping"),
    *unused("it is for the dataset self-cognition", "model_name", "model_author"),
    *unused("it is for datasets of decisions", "decision_drop_instructions", "decision_subsample_options",
            "decision_state_as_text", "decision_shuffle_fields"),
    # template
    Row("template", rule=template),
    Row("use_chat_template", rule=template),
    Row("system", "system"),
    Row("max_length", rule=length),
    Row("truncation_strategy", rule=length),
    Row("loss_scale", rule=loss),
    Row("packing", "packing", truth, default=False),
    *unused("documents of a row never attend to each other, and there is no padding", "padding_free", "padding_side",
            "packing_strategy"),
    Row("packing_length", refused="rows have batch_size * max_length tokens"),
    Row("sequence_parallel_size", refused="write tp_size", harmless=(1,)),
    *unused(_TEXT_ONLY, "max_pixels", "norm_bbox", "vit_gradient_checkpointing", "aligner_lr", "vit_lr", "freeze_vit",
            "freeze_aligner"),
    *refused(_TEXT_ONLY, "freeze_llm"),
    *unused("the chat template decides it", "agent_template", "template_backend", "enable_thinking",
            "preserve_thinking", "add_non_thinking_prefix", "disable_ignore_empty_think", "is_binary_loss_scale"),
    Row("response_prefix", refused="write it into the chat template"),
    # method
    Row("tuner_type", rule=rules.tuner, default="lora", aliases=("train_type", "sft_type")),
    Row("tuner_backend", refused="adapters are inserted by PEFT; lora_backend opendelta is the other choice",
        harmless=("peft",)),
    *(Row(name, rule=adapters, default=default) for name, default in (
        ("target_modules", "all-linear"), ("lora_rank", 8), ("lora_alpha", 32), ("lora_dropout", 0.05),
        ("use_rslora", UNSET), ("use_dora", UNSET), ("lorap_lr_ratio", UNSET), ("init_weights", UNSET),
        ("modules_to_save", UNSET),
    )),
    Row("lora_bias", refused="biases are not trained with adapters; write none", harmless=("none",)),
    Row("lora_dtype", ignored="adapters are kept in fp32"),
    Row("target_regex", refused="write the names of the layers as target_modules"),
    Row("target_parameters", refused="write the names of the layers as target_modules"),
    Row("freeze_parameters", "freeze", lambda value: ",".join(map(str, value if isinstance(value, list) else [value])),
        note="patterns of our names, such as encoder.layers.[0-9].*"),
    Row("freeze_parameters_regex", refused="write patterns as freeze"),
    Row("freeze_parameters_ratio", refused="write trainable_layers N, for the last N layers", harmless=(0, 0.0)),
    Row("trainable_parameters", refused="write patterns of what is not trained as freeze", harmless=([],)),
    Row("trainable_parameters_regex", refused="write patterns of what is not trained as freeze"),
    *unused(f"it is for another tuner; {_TUNER}", "lora_ga_batch_size", "lora_ga_iters", "lora_ga_max_length",
            "lora_ga_direction", "lora_ga_scale", "lora_ga_stable_gamma", "fourier_n_frequency", "fourier_scaling",
            "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "vera_rank",
            "vera_projection_prng_key", "vera_dropout", "vera_d_initial", "adapter_act", "adapter_length",
            "adalora_target_r", "adalora_init_r", "adalora_tinit", "adalora_tfinal", "adalora_deltaT", "adalora_beta1",
            "adalora_beta2", "adalora_orth_reg_weight", "llamapro_num_new_blocks", "llamapro_num_groups",
            "reft_layer_key", "reft_layers", "reft_rank", "reft_intervention_type", "reft_args"),
    Row("use_swift_lora", refused=_TUNER, harmless=(False,)),
    Row("quant_method", refused="weights are quantized by bitsandbytes; write bnb", harmless=("bnb",)),
    Row("quant_bits", rule=rules.tuner),
    Row("bnb_4bit_quant_type", rule=rules.tuner, default="nf4"),
    Row("bnb_4bit_use_double_quant", "double_quant", truth),
    *unused("layers are computed in the precision of the model", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
    *unused("it is for HQQ", "hqq_axis"),
    # training
    Row("rlhf_type", refused="RLHF is not supported; `sft` and `pt` are"),
    Row("learning_rate", rule=learning_rate),
    Row("bf16", rule=rules.precision),
    Row("fp16", rule=rules.precision),
    Row("report_to", rule=report_to),
    Row("per_device_train_batch_size", rule=batch, default=1, note="counts samples, since packing is false"),
    Row("per_device_eval_batch_size", "eval_batch_size", default=1),
    Row("gradient_accumulation_steps", rule=batch),
    Row("gradient_checkpointing", "activation_checkpoint", checkpointing, default=True,
        aliases=("activation_checkpointing",)),
    Row("logging_steps", rule=rules.logging, default=5),
    Row("weight_decay", "weight_decay", default=0.1, note="acts on matrices alone, as there"),
    Row("adam_beta2", "beta2", default=0.95),
    Row("lr_scheduler_type", rule=rules.schedule, default="cosine"),
    Row("max_epochs", refused="write num_train_epochs; the rates of a run end where it ends"),
    Row("optim", "optimizer", optimizer, default="adamw_torch_fused"),
    Row("optimizer", refused="write optim; LoRA+ is lorap_lr_ratio", harmless=("lorap",)),
    Row("acc_strategy", ignored="the accuracy is not measured"),
    *refused("the loss is the cross entropy", "enable_dft_loss", "enable_channel_loss", "loss_type"),
    *unused("it is for embedding models", "mrl_dims"),
    *unused("the loss needs no logits of other positions", "use_logits_to_keep"),
    *unused("an evaluation computes the loss alone", "eval_metric", "eval_dataset", "eval_dataset_args", "eval_limit",
            "eval_generation_config", "extra_eval_args"),
    *refused("an evaluation computes the loss alone", "eval_use_evalscope"),
    Row("early_stop_interval", "early_stopping_patience"),
    Row("callbacks", refused="write callbacks in Python; see docs/library.md", harmless=([],)),
    *refused("GaLore is not supported; write optimizer muon", "use_galore"),
    *unused("it is for GaLore", "galore_target_modules", "galore_rank", "galore_update_proj_gap", "galore_scale",
            "galore_proj_type", "galore_optim_per_parameter", "galore_with_embedding", "galore_quantization",
            "galore_proj_quant", "galore_proj_bits", "galore_proj_group_size", "galore_cos_threshold",
            "galore_gamma_proj", "galore_queue_size"),
    Row("lisa_activated_layers", refused="LISA is not supported; write trainable_layers", harmless=(0,)),
    *unused("it is for LISA", "lisa_step_interval"),
    *unused("it is for generation", "ds3_gather_for_generation"),
    *unused("checkpoints are written in the background with async_save true", "use_flash_ckpt"),
    *unused("`fm9g convert` writes safetensors", "safe_serialization", "max_shard_size"),
    *unused("RUN/last and RUN/best are paths of checkpoints", "create_checkpoint_symlink"),
    *unused("runs have names: run_name", "add_version"),
    Row("resume_only_model", refused="give the checkpoint as model, to start anew from its weights", harmless=(False,)),
    *refused("write zero_level and engine", "zero_hpz_partition_size", "deepspeed_autotp_size"),
    *unused("fm9g runs no code of a model", "external_plugins", "custom_register_path"),
    Row("merge_lora", refused="`fm9g lora merge BASE ADAPTER FOLDER` does that", harmless=(False,)),
    Row("ignore_args_error", refused="a wrong argument would have no effect, unseen", harmless=(False,)),
    *refused("fm9g starts its processes itself: --nproc, --nnodes", "use_ray"),
    *unused("it is for Ray", "ray_exp_name", "device_groups"),
    *unused("the variables of SwanLab set it", "swanlab_token", "swanlab_project", "swanlab_workspace",
            "swanlab_exp_name", "swanlab_notification_method", "swanlab_webhook_url", "swanlab_secret",
            "swanlab_sender_email", "swanlab_receiver_email", "swanlab_smtp_server", "swanlab_smtp_port",
            "swanlab_email_language", "swanlab_mode"),
    *unused(_INFERENCE, "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "stream",
            "stop_words", "logprobs", "top_logprobs", "structured_outputs_regex", "predict_with_generate"),
)  # fmt: skip
SWIFT = Dialect(
    "swift",
    "ms-swift",
    ROWS,
    version="4.6",
    constants=TRAINER,
    distinctive=(
        "tuner_type",
        "train_type",
        "split_dataset_ratio",
        "attn_impl",
        "quant_bits",
        "torch_dtype",
        "adapters",
    ),
)
