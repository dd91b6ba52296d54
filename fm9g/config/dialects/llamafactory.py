"""LLaMA-Factory 0.9.5: the arguments of its YAML files, which extend those of transformers."""

from __future__ import annotations

from pathlib import Path

from fm9g.config.dialects import rules
from fm9g.config.dialects.conversions import attention, layers, optimizer, truth
from fm9g.config.dialects.table import UNSET, Dialect, Given, Keys, Row, extend
from fm9g.config.dialects.transformers import TRAINER, TRAINING_ARGUMENTS
from fm9g.io.yaml_file import read_config_object

# Templates there -> chat_template here. For others the tokenizer's own is used, as that of the model's authors.
TEMPLATES = {
    "baichuan2": "baichuan2",
    "chatglm3": "chatglm3",
    "chatml": "chatml",
    "cpm": "minicpm",
    "deepseek3": "deepseek",
    "default": "default",
    "empty": "none",
    "glm4": "glm4",
    "intern2": "internlm2",
    "llama2": "llama2",
    "llama3": "llama",
    "mistral": "mistral",
    "qwen": "qwen",
    "qwen3": "qwen3",
    "yi": "yi",
}
_TEXT_ONLY = "fm9g trains on text"
_INFERENCE = "it is for inference; `fm9g chat` and `fm9g serve` take it, with --from llamafactory"
_EXPORT = "it is for the export; see `fm9g lora merge --help`"
_PREFERENCE = "there is no preference training here; stage sft and pt are"
_MUON = "write optim muon or adamw_8bit to save memory"
_SHOWN = "what is shown does not change what is trained"


def stage(given: Given) -> Keys:
    """The stage, and whether samples share a row."""
    name = given.choice("stage", "pt", "sft", "rm", "ppo", "dpo", "kto")
    if name not in ("", "pt", "sft"):
        raise given.error("stage", f"{name} is not supported: {_PREFERENCE}")
    packing = given["packing"]
    neat = given.flag("neat_packing")
    return {"packing": truth(packing) if packing is not None else neat or name == "pt"}


def data(given: Given) -> Keys:
    """dataset: names in dataset_dir/dataset_info.json, or files in dataset_dir."""
    return {"data": named} if (named := _named(given, "dataset")) else {}


def evaluation(given: Given) -> Keys:
    """eval_dataset and val_size, and how often."""
    found = rules.evaluation(given)
    return found | ({"val_data": _named(given, "eval_dataset")} if "val_data" in found else {})


def _named(given: Given, key: str) -> str:
    value = given[key]
    names = value if isinstance(value, list) else str(value or "").split(",")
    folder = given.text("dataset_dir")
    if folder.upper() == "ONLINE":
        folder = ""
    info = Path(folder) / "dataset_info.json"
    registered = read_config_object(info) if folder and info.is_file() else {}

    def located(name: str) -> str:
        is_path = not folder or (name not in registered and Path(name).exists())
        return name if is_path else str(Path(folder) / name)

    return ",".join(located(name) for item in names if (name := str(item).strip()))


def shares(given: Given) -> Keys:
    """How several datasets are mixed."""
    strategy = given.choice("mix_strategy", "concat", "interleave_under", "interleave_over", "interleave_once")
    if strategy not in ("", "concat"):
        raise given.error(
            "mix_strategy", f"{strategy} is not supported; write shares behind the names: --data NAME:0.7,NAME:0.3"
        )
    if given["interleave_probs"]:
        raise given.error("interleave_probs", "write shares behind the names: --data NAME:0.7,NAME:0.3")
    return {}


def turns(given: Given) -> Keys:
    """Which text has a loss."""
    on_prompt, last = given.flag("train_on_prompt"), given.flag("mask_history")
    if on_prompt and last:
        raise given.error("mask_history", "contradicts train_on_prompt; keep one of them")
    return {"train_on": "all" if on_prompt else "last" if last else "assistant"}


def template(given: Given) -> Keys:
    """The chat template."""
    name = given.text("template")
    if not name:
        return {}
    if name not in TEMPLATES:
        given.notes.append(f"template {name}: the chat template of the model's tokenizer is used")
    return {"chat_template": TEMPLATES.get(name, "tokenizer")}


def adapters(given: Given) -> Keys:
    """Rank, scale and kind of the adapters. Without adapters these arguments have no effect, as there."""
    if rules.tuner(given)["method"] not in ("lora", "qlora"):
        return {}
    rank = int(given.number("lora_rank") or 8)
    keys: Keys = {"lora_r": rank, "lora_alpha": given.number("lora_alpha") or 2 * rank}
    keys["lora_layer"] = layers(given["lora_target"] or "all")
    keys["lora_dropout"] = given.number("lora_dropout") or 0.0
    keys["use_rslora"] = given.flag("use_rslora")
    keys["use_dora"] = given.flag("use_dora")
    keys["loraplus_lr_ratio"] = given.number("loraplus_lr_ratio") or 1.0
    if given["additional_target"]:
        keys["modules_to_save"] = layers(given["additional_target"])
    if given.flag("pissa_init"):
        iterations = given.number("pissa_iter")
        if iterations not in (None, -1, 16):
            raise given.error("pissa_iter", f"found {iterations}, expected 16, or -1 for the exact decomposition")
        keys["init_lora_weights"] = "pissa" if iterations == -1 else "pissa_niter_16"
    if keys["use_dora"] and keys["loraplus_lr_ratio"] != 1.0:
        given.notes.append("loraplus_lr_ratio: the magnitudes of DoRA have the rate of A here, that of B there")
    return keys


def frozen(given: Given) -> Keys:
    """The layers that method freeze trains."""
    if given.text("finetuning_type").lower() != "freeze":
        return {}
    number = int(given.number("freeze_trainable_layers") or 0)
    if not number:
        raise given.error("freeze_trainable_layers", "0 layers are trained; give a number from 1, or below 0")
    if given.text("freeze_trainable_modules").lower() not in ("", "all"):
        raise given.error("freeze_trainable_modules", "whole layers are trained; write all, or use the key freeze")
    if given["freeze_extra_modules"]:
        raise given.error("freeze_extra_modules", "the layers alone are trained; use the key freeze for other choices")
    return {"trainable_layers": number}


def new_tokens(given: Given) -> Keys:
    """Tokens that are added to the vocabulary: a file, one per line."""
    named = given.text("add_tokens")
    if not named:
        return {}
    if not Path(named).is_file():
        raise given.error(
            "add_tokens", f"write the tokens into a file, one per line, and its name here; {named} is none"
        )
    return {"new_tokens": named}


def rope(given: Given) -> Keys:
    """rope_scaling. The factor is that of the lengths, as there."""
    kind = given.choice("rope_scaling", "linear", "dynamic", "yarn", "llama3")
    if not kind:
        return {}
    raise given.error(
        "rope_scaling",
        f"write model.rope_scaling_type {'dynamic ntk' if kind == 'dynamic' else kind} and model.rope_scaling_factor, "
        "the factor between cutoff_len and the length that the model was trained on",
    )


def optimization(given: Given) -> Keys:
    """use_muon, or else optim."""
    if given.flag("use_muon"):
        return {"optimizer": "muon"}
    try:
        return {"optimizer": optimizer(given["optim"])}
    except ValueError as error:
        raise given.error("optim", f"found {given['optim']!r}, {error}") from None


def report_to(given: Given) -> Keys:
    """The trackers, and SwanLab beside them."""
    found = rules.report_to(given)["report_to"]
    if not given.flag("use_swanlab"):
        return {"report_to": found}
    return {"report_to": ",".join(dict.fromkeys([*found.replace("none", "").split(","), "swanlab"])).strip(",")}


def unused(reason: str, *names: str) -> tuple[Row, ...]:
    """Rows of arguments without an effect."""
    return tuple(Row(name, ignored=reason) for name in names)


def refused(reason: str, *names: str) -> tuple[Row, ...]:
    """Rows of arguments that only may be false."""
    return tuple(Row(name, refused=reason, harmless=(False, 0)) for name in names)


ROWS = extend(
    TRAINING_ARGUMENTS,
    # model
    Row("model_name_or_path", "model"),
    Row("adapter_name_or_path", "adapter", note="training continues this adapter, under its own rank and layers"),
    Row("resize_vocab", ignored="new_tokens grows the vocabulary as far as it must"),
    Row("add_tokens", rule=new_tokens),
    Row("add_special_tokens", refused="special tokens cannot be added; add_tokens adds plain ones"),
    Row("new_special_tokens_config", refused="special tokens cannot be added; add_tokens adds plain ones"),
    Row("init_special_tokens", ignored="new tokens start as the mean of the others"),
    Row("rope_scaling", rule=rope),
    Row("flash_attn", "flash", attention),
    Row("disable_gradient_checkpointing", "activation_checkpoint", lambda value: "none" if truth(value) else "full",
        default=False),
    Row("train_from_scratch", refused="give the name of a file in model_configs/ as model, for random weights",
        harmless=(False,)),
    Row("model_revision", refused="a hub name is the revision that was downloaded", harmless=("main",)),
    *unused("a tokenizer is opened as it is", "use_fast_tokenizer", "split_special_tokens"),
    *unused("the engine places the weights", "low_cpu_mem_usage", "device_map", "compute_dtype"),
    *unused("layers are recomputed exactly", "use_reentrant_gc", "use_unsloth_gc"),
    *unused("norms and the loss are computed in fp32", "upcast_layernorm", "upcast_lmhead_output"),
    *unused("kernels are chosen for the machine", "use_unsloth", "enable_liger_kernel", "use_v1_kernels"),
    *unused("documents of a row never attend to each other", "block_diag_attn"),
    *unused("fm9g runs no code of a model", "trust_remote_code"),
    *unused("the cache of the hub is used", "cache_dir", "hf_hub_token", "ms_hub_token", "om_hub_token"),
    *unused(_SHOWN, "print_param_status"),
    *unused("cutoff_len decides", "model_max_length"),
    *refused("it changes the model, which cannot be exported then", "shift_attn", "mixture_of_depths", "use_llama_pro"),
    Row("moe_aux_loss_coef", refused="9G models have no mixture of experts"),
    Row("adapter_folder", ignored="adapters are paths"),
    *unused(_INFERENCE, "infer_backend", "offload_folder", "use_kv_cache", "infer_dtype"),
    Row("quantization_method", refused="weights are quantized by bitsandbytes; write bnb", harmless=("bnb", "BNB")),
    Row("quantization_bit", rule=rules.tuner),
    Row("quantization_type", rule=rules.tuner, default="nf4"),
    Row("double_quantization", "double_quant", truth),
    Row("quantization_device_map", ignored="the engine places the weights"),
    *unused(_TEXT_ONLY, "image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches",
            "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen", "use_audio_in_video",
            "audio_sampling_rate", "media_dir", "freeze_vision_tower", "freeze_multi_modal_projector"),
    *refused(_TEXT_ONLY, "freeze_language_model"),
    *unused(_EXPORT, "export_dir", "export_size", "export_device", "export_quantization_bit",
            "export_quantization_dataset", "export_quantization_nsamples", "export_quantization_maxlen",
            "export_legacy_format", "export_hub_model_id"),
    *unused(_INFERENCE, "vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager", "vllm_max_lora_rank", "vllm_config",
            "sglang_maxlen", "sglang_mem_fraction", "sglang_tp_size", "sglang_config", "sglang_lora_backend"),
    *refused("KTransformers is not supported", "use_kt", "kt_weight_path", "kt_expert_checkpoint_path",
             "kt_use_lora_experts", "kt_lora_expert_num", "kt_lora_expert_intermediate_size"),
    # data
    Row("template", rule=template),
    Row("dataset", rule=data),
    Row("dataset_dir", rule=data, default="data"),
    Row("eval_dataset", rule=evaluation),
    Row("val_size", rule=evaluation, note="drawn by split_seed"),
    Row("eval_strategy", rule=evaluation, default="no", aliases=("evaluation_strategy",)),
    Row("eval_steps", rule=evaluation),
    Row("cutoff_len", "max_length", default=2048),
    Row("train_on_prompt", rule=turns),
    Row("mask_history", rule=turns),
    Row("mix_strategy", rule=shares),
    Row("interleave_probs", rule=shares),
    Row("max_samples", "max_samples"),
    Row("packing", rule=stage),
    Row("neat_packing", rule=stage),
    Row("default_system", "system"),
    Row("tool_format", refused="the chat template decides how tools are written"),
    *unused("the chat template decides what becomes of thoughts", "enable_thinking", "preserve_thinking"),
    *unused("records are indexed once, and encoded while the run reads them", "streaming", "buffer_size",
            "overwrite_cache", "preprocessing_batch_size", "preprocessing_num_workers", "tokenized_path",
            "data_shared_file_system"),
    *unused("padding has no loss", "ignore_pad_token_for_loss"),
    *unused("each validation dataset has its own curve", "eval_on_each_dataset"),
    *unused(_INFERENCE, "eval_num_beams"),
    *refused("samples are drawn at random", "disable_shuffling"),
    # method
    Row("stage", rule=stage, default="sft"),
    Row("finetuning_type", rule=rules.tuner, default="lora"),
    *(Row(name, rule=adapters, default=default) for name, default in (
        ("lora_rank", 8), ("lora_alpha", UNSET), ("lora_dropout", 0.0), ("lora_target", "all"), ("use_rslora", UNSET),
        ("use_dora", UNSET), ("loraplus_lr_ratio", UNSET), ("additional_target", UNSET), ("pissa_init", UNSET),
        ("pissa_iter", UNSET),
    )),
    Row("loraplus_lr_embedding", ignored="embeddings have no adapters"),
    Row("pissa_convert", ignored="a PiSSA adapter is always saved as one for the original model"),
    Row("create_new_adapter", refused="merge the first adapter: `fm9g lora merge`", harmless=(False,)),
    *(Row(name, rule=frozen, default=default) for name, default in (
        ("freeze_trainable_layers", 2), ("freeze_trainable_modules", "all"), ("freeze_extra_modules", UNSET),
    )),
    *unused("it is for OFT", "oft_rank", "oft_block_size", "oft_target", "module_dropout"),
    *unused(_PREFERENCE, "pref_beta", "pref_ftx", "pref_bco_weight", "pref_loss", "dpo_label_smoothing",
            "kto_chosen_weight", "kto_rejected_weight", "simpo_gamma", "ppo_buffer_size", "ppo_epochs",
            "ppo_score_norm", "ppo_target", "ppo_whiten_rewards", "ref_model", "ref_model_adapters",
            "ref_model_quantization_bit", "reward_model", "reward_model_adapters", "reward_model_quantization_bit",
            "reward_model_type", "ld_alpha"),
    *refused(f"GaLore is not supported; {_MUON}", "use_galore"),
    *unused("it is for GaLore", "galore_target", "galore_rank", "galore_update_interval", "galore_scale",
            "galore_proj_type", "galore_layerwise"),
    *refused(f"APOLLO is not supported; {_MUON}", "use_apollo"),
    *unused("it is for APOLLO", "apollo_target", "apollo_rank", "apollo_update_interval", "apollo_scale",
            "apollo_proj", "apollo_proj_type", "apollo_scale_type", "apollo_layerwise", "apollo_scale_front"),
    *refused(f"BAdam is not supported; {_MUON}", "use_badam"),
    *unused("it is for BAdam", "badam_mode", "badam_start_block", "badam_switch_mode", "badam_switch_interval",
            "badam_update_ratio", "badam_mask_mode", "badam_verbose"),
    *refused(f"Adam-mini is not supported; {_MUON}", "use_adam_mini"),
    Row("use_muon", rule=optimization),
    Row("optim", rule=optimization, default="adamw_torch_fused"),
    Row("use_swanlab", rule=report_to),
    Row("report_to", rule=report_to, default="none"),
    *unused("the variables of SwanLab set it", "swanlab_project", "swanlab_workspace", "swanlab_run_name",
            "swanlab_mode", "swanlab_api_key", "swanlab_logdir", "swanlab_lark_webhook_url", "swanlab_lark_secret"),
    *refused("weights are kept in fp32; write bf16 true", "pure_bf16"),
    *refused("the loss is the cross entropy", "use_dft_loss", "use_asft_loss", "use_eaft_loss"),
    *unused("it is for losses that are not here", "asft_alpha", "eaft_alpha"),
    *refused("the engines are bmtrain and torch", "use_mca", "use_hyper_parallel", "hyper_parallel_args"),
    *refused("write model.half_type bf16", "fp8"),
    *unused("it is for fp8", "fp8_backend", "fp8_enable_fsdp_float8_all_gather"),
    *unused("an evaluation computes the loss alone", "compute_accuracy"),
    Row("early_stopping_steps", "early_stopping_patience"),
    *unused("`fm9g report` draws the curves", "plot_loss"),
    *unused("tokens per second are always measured", "include_effective_tokens_per_second"),
    *unused("fm9g starts its processes itself: --nproc, --nnodes", "ray_num_workers", "ray_init_kwargs"),
    *unused("the launcher sets it", "master_addr", "master_port"),
    *refused("there is no profiler; see the phases in the log", "enable_torch_profiler"),
    *unused("it is for the profiler", "profiler_output_dir", "profiler_wait_steps", "profiler_warmup_steps",
            "profiler_active_steps", "profiler_repeat", "profiler_record_shapes", "profiler_profile_memory",
            "profiler_with_stack", "profile_modules"),
    # generation and evaluation
    *refused("`fm9g generate` continues a prompt", "predict_with_generate"),
    *unused(_INFERENCE, "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens",
            "repetition_penalty", "length_penalty", "skip_special_tokens", "generation_max_length",
            "generation_num_beams", "generation_config", "sortish_sampler"),
    *unused("it is for `llamafactory-cli eval`", "task", "task_dir", "batch_size", "lang", "n_shot", "save_dir",
            "download_mode"),
)  # fmt: skip
LLAMAFACTORY = Dialect(
    "llamafactory",
    "LLaMA-Factory",
    ROWS,
    version="0.9.5",
    constants=TRAINER,
    distinctive=("finetuning_type", "cutoff_len", "lora_target", "dataset_dir", "stage", "freeze_trainable_layers"),
)
