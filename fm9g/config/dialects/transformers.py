"""transformers: TrainingArguments of 5.23, earlier names of them, and the scripts that are built on them."""

from __future__ import annotations

from fm9g.config.dialects import rules
from fm9g.config.dialects.conversions import attention, checkpointing, optimizer, resume, truth
from fm9g.config.dialects.deepspeed import deepspeed_file
from fm9g.config.dialects.table import Dialect, Row, extend

_SHOWN = "what is shown does not change what is trained"
_KERNELS = "kernels are chosen for the machine"
_SUPERVISED = "fm9g supervises its processes itself; the key timeout sets how long it waits"
_LOADER = "the loader reads ahead with dataloader_num_workers processes"
_HUB = "fm9g does not upload; `fm9g convert` writes a folder to upload"
_EVALUATION = "an evaluation computes the loss alone"
_SAMPLED = "the order of samples depends on seed alone"

# What the Trainer always does: micro-batches of samples, an epoch that ends with a step, decay of matrices alone.
# Longer texts are truncated.
TRAINER = {"packing": False, "decay_norm_and_bias": False, "oversize_rule": "head"}
# Arguments of the Trainer. A default is there where the one of ours is another.
TRAINING_ARGUMENTS = (
    # length and batch
    Row("num_train_epochs", rule=rules.training_length, default=3.0),
    Row("max_steps", rule=rules.training_length, default=-1),
    Row("per_device_train_batch_size", "batch_size", default=8, note="counts samples, since packing is false"),
    Row("per_device_eval_batch_size", "eval_batch_size", default=8),
    Row("gradient_accumulation_steps", "gradient_accumulation_steps", default=1),
    Row(
        "auto_find_batch_size",
        refused="write test_oom_error true once; it says which batch size fits",
        harmless=(False,),
    ),
    # optimizer and schedule
    Row("learning_rate", "lr", default=5e-5),
    Row(
        "weight_decay",
        "weight_decay",
        default=0.0,
        note="acts on matrices alone: decay_norm_and_bias is false, as there",
    ),
    Row("adam_beta1", "beta1", default=0.9),
    Row("adam_beta2", "beta2", default=0.999),
    Row("adam_epsilon", "eps", default=1e-8),
    Row("max_grad_norm", "clip_grad", default=1.0),
    Row("optim", "optimizer", optimizer, default="adamw_torch_fused"),
    Row("optim_args", refused="optimizers have their own keys here: beta1, beta2, eps, sgd_momentum, muon_momentum"),
    Row("optim_target_modules", refused="GaLore and APOLLO are not supported; write optimizer muon, or lora_layer"),
    Row("lr_scheduler_type", rule=rules.schedule, default="linear"),
    Row("lr_scheduler_kwargs", rule=rules.schedule),
    Row("warmup_steps", rule=rules.warmup, default=0),
    Row("warmup_ratio", rule=rules.warmup, default=0.0),
    Row("label_smoothing_factor", "label_smoothing"),
    Row("neftune_noise_alpha", "neftune_alpha"),
    # precision and memory
    Row("bf16", rule=rules.precision, default=False),
    Row("fp16", rule=rules.precision, default=False),
    Row("tf32", ignored=_KERNELS),
    Row("bf16_full_eval", ignored="evaluations compute in the precision of the training"),
    Row("fp16_full_eval", ignored="evaluations compute in the precision of the training"),
    Row("gradient_checkpointing", "activation_checkpoint", checkpointing, aliases=("activation_checkpointing",)),
    Row(
        "gradient_checkpointing_kwargs",
        ignored="layers are recomputed exactly, dropout included",
        aliases=("activation_checkpointing_kwargs",),
    ),
    Row("torch_compile", ignored=_KERNELS),
    Row("torch_compile_backend", ignored=_KERNELS),
    Row("torch_compile_mode", ignored=_KERNELS),
    Row("use_liger_kernel", ignored=_KERNELS),
    Row("liger_kernel_config", ignored=_KERNELS),
    Row("torch_empty_cache_steps", ignored="the memory of the device is kept and used again"),
    Row("use_cache", ignored="it is for generation"),
    # evaluation, saving, logging
    Row("eval_strategy", rule=rules.evaluation, default="no", aliases=("evaluation_strategy",)),
    Row("eval_steps", rule=rules.evaluation),
    Row("eval_delay", refused="evaluations begin with the run", harmless=(0,)),
    Row(
        "eval_on_start",
        refused="the first evaluation is after eval_steps; `fm9g train` has none before",
        harmless=(False,),
    ),
    Row("eval_accumulation_steps", ignored=_EVALUATION),
    Row("eval_do_concat_batches", ignored=_EVALUATION),
    Row("eval_use_gather_object", ignored=_EVALUATION),
    Row("batch_eval_metrics", ignored=_EVALUATION),
    Row("include_for_metrics", ignored=_EVALUATION, aliases=("include_inputs_for_metrics",)),
    Row("prediction_loss_only", ignored=_EVALUATION),
    Row("label_names", ignored=_EVALUATION),
    Row("save_strategy", rule=rules.saving, default="steps"),
    Row("save_steps", rule=rules.saving, default=500),
    Row("save_total_limit", rule=rules.no_limit_of_checkpoints),
    Row("save_only_model", "save_model_only", truth),
    Row("save_on_each_node", ignored="checkpoints are complete, and written once"),
    Row("save_safetensors", ignored="`fm9g convert` writes safetensors"),
    Row("enable_jit_checkpoint", ignored="a signal saves a checkpoint in any case"),
    Row("load_best_model_at_end", ignored="RUN/best is the path of the best checkpoint"),
    Row(
        "metric_for_best_model", refused="the validation loss decides; write eval_loss", harmless=("loss", "eval_loss")
    ),
    Row("greater_is_better", refused="the validation loss decides, and a lower one is better", harmless=(False,)),
    Row("early_stopping_patience", "early_stopping_patience"),
    Row("logging_strategy", rule=rules.logging, default="steps"),
    Row("logging_steps", rule=rules.logging, default=500),
    Row("logging_first_step", ignored=_SHOWN),
    Row("logging_nan_inf_filter", ignored="a step whose loss is not finite is skipped and reported"),
    Row("logging_dir", ignored="TensorBoard files are in output_dir/tensorboard"),
    Row("log_on_each_node", ignored=_SHOWN),
    Row("log_level", ignored=_SHOWN),
    Row("log_level_replica", ignored=_SHOWN),
    Row("disable_tqdm", ignored=_SHOWN),
    Row("include_num_input_tokens_seen", ignored="tokens are always counted"),
    Row("include_tokens_per_second", ignored="tokens per second are always measured"),
    Row("skip_memory_metrics", ignored="memory is always measured"),
    Row("report_to", rule=rules.report_to, default="none"),
    Row("project", "exp_group"),
    Row("trackio_space_id", ignored="Trackio is not a tracker here"),
    Row("trackio_bucket_id", ignored="Trackio is not a tracker here"),
    Row("trackio_static_space_id", ignored="Trackio is not a tracker here"),
    # files and order
    Row("output_dir", rule=rules.output, note="checkpoints are in output_dir/checkpoints/RUN"),
    Row("run_name", rule=rules.output),
    Row("overwrite_output_dir", "overwrite", truth),
    Row("resume_from_checkpoint", "resume_ckpt", resume),
    Row(
        "ignore_data_skip",
        refused="a resumed run continues in its data; start from the weights with --pretrained_model",
        harmless=(False,),
    ),
    Row("restore_callback_states_from_checkpoint", ignored="a resumed run restores all of its state"),
    Row("seed", "seed", default=42, note="another random generator: the order of samples is another one than there"),
    Row("data_seed", ignored=_SAMPLED),
    Row("full_determinism", ignored="runs are deterministic on a given machine"),
    Row(
        "train_sampling_strategy",
        refused="samples are drawn at random; write random",
        harmless=("random",),
    ),
    Row("group_by_length", refused="samples are drawn at random; write false", harmless=(False,)),
    Row("length_column_name", ignored="lengths are measured"),
    Row("remove_unused_columns", ignored="records are read by their keys"),
    Row("dataloader_num_workers", "dataloader_num_workers"),
    Row("dataloader_drop_last", refused="the last samples of an epoch are trained on", harmless=(False,)),
    Row("dataloader_pin_memory", ignored=_LOADER),
    Row("dataloader_persistent_workers", ignored=_LOADER),
    Row("dataloader_prefetch_factor", "dataloader_prefetch_factor"),
    Row("dataloader_multiprocessing_context", ignored=_LOADER),
    Row("dataloader_in_order", ignored=_LOADER),
    # processes
    Row("use_cpu", "device", lambda value: "cpu" if truth(value) else "auto", aliases=("no_cuda",)),
    Row("deepspeed", rule=deepspeed_file),
    Row(
        "fsdp",
        refused="write engine torch; zero_level 3 shards weights, 2 gradients and optimizer state alone",
        harmless=(False, "", []),
    ),
    Row("fsdp_config", refused="write engine torch and zero_level"),
    Row("accelerator_config", ignored=_SUPERVISED),
    Row("parallelism_config", refused="write tp_size for tensor parallelism"),
    Row("average_tokens_across_devices", ignored="the loss is the mean over the tokens of all processes"),
    Row("ddp_backend", ignored=_SUPERVISED),
    Row("ddp_timeout", ignored=_SUPERVISED),
    Row("ddp_find_unused_parameters", ignored=_SUPERVISED),
    Row("ddp_bucket_cap_mb", ignored=_SUPERVISED),
    Row("ddp_broadcast_buffers", ignored=_SUPERVISED),
    Row("ddp_static_graph", ignored=_SUPERVISED),
    Row("local_rank", ignored="the launcher sets it"),
    Row("debug", ignored=_SHOWN),
    # what the Trainer does
    Row("do_train", ignored="`fm9g train` trains"),
    Row("do_eval", ignored="it evaluates if there is data for it"),
    Row("do_predict", refused="`fm9g generate` continues a prompt", harmless=(False,)),
    Row("push_to_hub", refused=_HUB, harmless=(False,)),
    Row("hub_model_id", ignored=_HUB),
    Row("hub_strategy", ignored=_HUB),
    Row("hub_token", ignored=_HUB),
    Row("hub_private_repo", ignored=_HUB),
    Row("hub_always_push", ignored=_HUB),
    Row("hub_revision", ignored=_HUB),
)

_ADAPTERS = rules.adapter_rule(
    rules.tuner,
    {
        "lora_r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "lora_layer": "lora_target_modules",
    },
)
# Arguments of the training scripts around it: FastChat, Qwen, run_clm.py.
SCRIPT_ARGUMENTS = (
    Row("model_name_or_path", "model"),
    Row("tokenizer_name", "tokenizer_path", aliases=("tokenizer_name_or_path",)),
    Row("data_path", rule=rules.data, aliases=("train_path",)),
    Row("train_file", rule=rules.data),
    Row("dataset_name", rule=rules.data),
    Row("eval_data_path", rule=rules.evaluation),
    Row("eval_file", rule=rules.evaluation),
    Row("validation_file", rule=rules.evaluation),
    Row("model_max_length", "max_length", aliases=("max_seq_length", "max_length", "block_size")),
    Row("max_train_samples", "train_sample"),
    Row("max_eval_samples", "val_sample"),
    Row("lazy_preprocess", ignored="records are always encoded while the run reads them"),
    Row("preprocessing_num_workers", ignored=_LOADER),
    Row("use_lora", rule=rules.tuner),
    Row("q_lora", rule=rules.tuner),
    Row("lora_r", rule=_ADAPTERS, default=64),
    Row("lora_alpha", rule=_ADAPTERS, default=16),
    Row("lora_dropout", rule=_ADAPTERS, default=0.05),
    Row("lora_target_modules", rule=_ADAPTERS),
    Row("lora_weight_path", "adapter"),
    Row("lora_bias", refused="biases are not trained with adapters; write none", harmless=("none",)),
    Row("attn_implementation", "flash", attention, aliases=("flash_attn", "use_flash_attn")),
    Row("torch_dtype", rule=rules.precision, aliases=("dtype",)),
    Row("cache_dir", ignored="hub names are found in the cache of the hub"),
    Row("trust_remote_code", ignored="fm9g runs no code of a model"),
)

TRANSFORMERS = Dialect(
    "transformers",
    "transformers",
    extend(TRAINING_ARGUMENTS, *SCRIPT_ARGUMENTS),
    version="5.23",
    constants=TRAINER,
    distinctive=("data_path", "use_lora", "q_lora", "lazy_preprocess", "model_max_length"),
)
