"""Inference arguments of other tools, one table each. Keys are options of generate, chat, serve and lora merge."""

from __future__ import annotations

from fm9g.config.dialects import infer_rules as to
from fm9g.config.dialects import llamafactory, swift, swift_sft
from fm9g.config.dialects.conversions import comma_list, truth
from fm9g.config.dialects.llamafactory import LLAMAFACTORY, refused, unused
from fm9g.config.dialects.scripts import FINETUNE_JSON
from fm9g.config.dialects.swift import SWIFT
from fm9g.config.dialects.swift_sft import SWIFT_SFT
from fm9g.config.dialects.table import Dialect, Given, Keys, Row

FOR_TRAINING = "it is for training"
_KERNELS = "kernels are chosen for the machine"
_HUB = "fm9g does not upload"
_CALIBRATED = "weights are not calibrated; --quantization nf4 or int8 quantizes them when they are opened"
_SAFETENSORS = "weights are written as safetensors"
_SGLANG = "the backends are transformers and vllm"
_BEAMS = "texts are sampled, not searched with beams; write 1"
_VLLM_OPTION = "`fm9g serve` has no option for it"
_SIZE = "a file of weights has up to 5 GB"


def with_training(training: Dialect, *rows: Row, kept: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """Rows of inference, and one without effect for each other argument that the tool has for training.

    Args:
        kept: arguments that mean here what they mean in training.
    """
    own = {name for row in rows for name in (row.name, *row.aliases)}
    others = (row for row in training.rows if row.name not in own)
    return (
        *rows,
        *(row if row.name in kept else Row(row.name, ignored=row.ignored or FOR_TRAINING, aliases=row.aliases)
          for row in others),
    )  # fmt: skip


SAMPLING = (
    Row("repetition_penalty", "repetition_penalty", to.number),
    Row("num_beams", refused=_BEAMS, harmless=(1,)),
)

# infer.sh of ms-swift of 2023


def checkpoint(given: Given) -> Keys:
    """ckpt_dir is a checkpoint, an adapter or a folder; an adapter names its base, unless model_id_or_path does.
    merge_lora_and_save, of sft_type lora, merges it into its base first, as CKPT_DIR-merged.
    """
    path = given.text("ckpt_dir").rstrip("/")
    if not path:
        raise given.error("ckpt_dir", "is missing; give the checkpoint that the training saved")
    base = given.first("model_id_or_path", "model_cache_dir")
    is_full = given.choice("sft_type", "lora", "full") == "full"
    if given.flag("merge_lora_and_save"):
        if is_full:
            raise given.error("merge_lora_and_save", "sft_type full has no adapter to merge; leave it out")
        if given["quantization_bit"]:
            raise given.error("merge_lora_and_save", "an adapter is merged into weights that are not quantized; "
                              "leave out quantization_bit")  # fmt: skip
    keys: Keys = {"merge_first": given.flag("merge_lora_and_save")}
    return keys | ({"model": base, "adapters": (path,)} if base and not is_full else {"model": path})


def who_asks(given: Given) -> Keys:
    """eval_human: a person writes the questions, in a chat; else they are those of the validation records."""
    return {"verb": "chat" if given.flag("eval_human") else "generate"}


def prompt_length(given: Given) -> Keys:
    """max_length of the prompt; with max_new_tokens, the length of prompt and answer together."""
    new = int(given.number("max_new_tokens") or 1024)
    if "max_length" not in given.given:
        return {"max_new_tokens": new}
    given.notes.append("max_length: a longer prompt is refused; there it loses its beginning")
    return {"max_new_tokens": new, "max_model_len": int(given.number("max_length") or 2048) + new}


INFER_SH = Dialect(
    "swift-sft",
    "ms-swift of 2023 (infer.sh)",
    with_training(
        SWIFT_SFT,
        Row("model_type", ignored="ckpt_dir says what its model is; model_id_or_path names another base"),
        Row("model_id_or_path", rule=checkpoint),
        Row("model_cache_dir", rule=checkpoint),
        Row("sft_type", rule=checkpoint, default="lora"),
        Row("ckpt_dir", rule=checkpoint),
        Row("merge_lora_and_save", rule=checkpoint, default=False),
        Row("template_type", "chat_template", swift_sft.template),
        Row("eval_human", rule=who_asks, default=False),
        Row("seed", "seed", to.whole, default=42),
        Row("dtype", "dtype", to.dtype, default="bf16"),
        Row("ignore_args_error", refused="a wrong argument would have no effect, unseen", harmless=(False,)),
        Row("dataset", "data", comma_list, default="blossom-math-zh"),
        Row("dataset_split_seed", "split_seed", to.whole, default=42),
        Row("dataset_test_ratio", "val_split", to.number, default=0.01),
        Row("show_dataset_sample", "sample", to.number_or_all, default=20),
        Row("system", "system", to.name, default="you are a helpful assistant!"),
        Row("max_length", rule=prompt_length),
        Row("max_new_tokens", rule=prompt_length, default=1024),
        Row("quantization_bit", rule=to.bits, default=0),
        Row("bnb_4bit_quant_type", rule=to.bits, default="nf4"),
        Row("bnb_4bit_comp_dtype", ignored="layers are computed in dtype"),
        Row("bnb_4bit_use_double_quant", refused="4-bit weights always have double quantization", harmless=(True,)),
        Row("do_sample", rule=to.sampling, default=True),
        Row("temperature", rule=to.sampling, default=0.9),
        Row("top_k", rule=to.sampling, default=20),
        Row("top_p", rule=to.sampling, default=0.9),
        Row("repetition_penalty", "repetition_penalty", to.number, default=1.0),
        Row("use_flash_attn", ignored=_KERNELS),
        Row("use_streamer", "stream", truth, default=True),
        Row("save_generation_config", "save_generation_config", truth, default=True),
    ),
    constants={"references": True},
)  # fmt: skip

# LLaMA-Factory: chat, api, webchat and export


def one_adapter(given: Given) -> Keys:
    """adapter_name_or_path: an adapter. Only finetuning_type lora has one."""
    kind = given.choice("finetuning_type", "lora", "full", "freeze", "oft")
    value = given["adapter_name_or_path"]
    paths = [str(path).strip() for path in (value if isinstance(value, list) else str(value or "").split(","))]
    paths = [path for path in paths if path]
    if kind == "oft":
        raise given.error("finetuning_type", "oft is not supported; adapters are LoRA")
    if paths and kind in ("full", "freeze"):
        raise given.error("adapter_name_or_path", f"finetuning_type {kind} has no adapter; write lora")
    if len(paths) > 1:
        raise given.error("adapter_name_or_path", f"{len(paths)} adapters are merged into one there; here "
                          f"`fm9g lora combine {' '.join(paths)} --out FOLDER` makes one of them")  # fmt: skip
    return {"adapters": tuple(paths)} if paths else {}


def built_in_template(given: Given) -> Keys:
    """The chat template; that of the model's tokenizer where there is none of the name."""
    found = llamafactory.template(given)
    return {} if found.get("chat_template") == "tokenizer" else found


def answer_length(given: Given) -> Keys:
    """max_new_tokens; where it is not positive, max_length, which counts the prompt too."""
    new = int(given.number("max_new_tokens") or 0)
    if new > 0:
        return {"max_new_tokens": new}
    both = int(given.number("max_length") or 1024)
    return {"max_new_tokens": both, "max_model_len": both}


def llamafactory_backend(given: Given) -> Keys:
    """infer_backend, and vllm_maxlen and vllm_gpu_util, which count for vllm alone."""
    name = given.choice("infer_backend", "huggingface", "vllm", "sglang", "ktransformers")
    if name in ("sglang", "ktransformers"):
        raise given.error("infer_backend", f"{name} is not supported; write huggingface or vllm")
    if name != "vllm":
        return {}
    return {"backend": "vllm", "max_model_len": int(given.number("vllm_maxlen") or 4096),
            "gpu_memory_utilization": given.number("vllm_gpu_util")}  # fmt: skip


def export(given: Given) -> Keys:
    """export_dir: the folder of the merged model."""
    folder = given.text("export_dir")
    if folder and not given["adapter_name_or_path"]:
        raise given.error("export_dir", "there is no adapter to merge; `fm9g convert MODEL FOLDER` writes a model")
    return {"verb": "merge", "merge_to": folder} if folder else {}


LLAMAFACTORY_INFER = Dialect(
    "llamafactory",
    "LLaMA-Factory (chat, api, webchat and export)",
    with_training(
        LLAMAFACTORY,
        Row("model_name_or_path", "model", to.name),
        Row("adapter_name_or_path", rule=one_adapter),
        Row("finetuning_type", rule=one_adapter, default="lora"),
        Row("stage", refused="models continue texts; write sft or pt", harmless=("sft", "pt")),
        Row("template", rule=built_in_template),
        Row("default_system", "system", to.name),
        Row("infer_backend", rule=llamafactory_backend, default="huggingface"),
        Row("vllm_maxlen", rule=llamafactory_backend, default=4096),
        Row("vllm_gpu_util", rule=llamafactory_backend, default=0.7),
        *unused("vLLM starts with its own default", "vllm_enforce_eager", "vllm_max_lora_rank"),
        Row("vllm_config", refused=_VLLM_OPTION, harmless=({},)),
        *unused(_SGLANG, "sglang_maxlen", "sglang_mem_fraction", "sglang_tp_size", "sglang_config",
                "sglang_lora_backend"),
        Row("infer_dtype", "dtype", to.dtype, default="auto"),
        Row("quantization_bit", rule=to.bits),
        Row("quantization_type", rule=to.bits, default="nf4"),
        Row("quantization_method", refused="weights are quantized by bitsandbytes; write bnb", harmless=("bnb", "BNB")),
        Row("double_quantization", refused="4-bit weights always have double quantization", harmless=(True,)),
        Row("do_sample", rule=to.sampling, default=True),
        Row("temperature", rule=to.sampling, default=0.95),
        Row("top_p", rule=to.sampling, default=0.7),
        Row("top_k", rule=to.sampling, default=50),
        Row("max_length", rule=answer_length),
        Row("max_new_tokens", rule=answer_length, default=1024),
        *SAMPLING,
        Row("length_penalty", ignored="it is for beams"),
        Row("skip_special_tokens", refused="special tokens are not part of an answer", harmless=(True,)),
        Row("seed", "seed", to.whole),
        *unused("weights that do not fit are refused when they are opened", "offload_folder"),
        Row("use_kv_cache", refused="a generation keeps the keys and values of its prompt", harmless=(True,)),
        Row("trust_remote_code", ignored="no code of a model is run"),
        *unused(_KERNELS, "flash_attn"),
        Row("rope_scaling", refused="the model's own configuration decides; edit its config.json"),
        *refused("a model is opened with its weights", "train_from_scratch"),
        *unused("it is for use_kt, which is refused", "kt_weight_path", "kt_expert_checkpoint_path",
                "kt_use_lora_experts", "kt_lora_expert_num", "kt_lora_expert_intermediate_size"),
        *(Row(name, refused="the tokens of the model are used; train with new_tokens")
          for name in ("add_tokens", "add_special_tokens", "new_special_tokens_config")),
        Row("tool_format", refused="the chat template decides how tools are written"),
        Row("export_dir", rule=export),
        *unused(_SIZE, "export_size"),
        *unused("weights are merged on the CPU", "export_device"),
        Row("export_quantization_bit", refused=_CALIBRATED),
        *unused("it is for export_quantization_bit", "export_quantization_dataset", "export_quantization_nsamples",
                "export_quantization_maxlen"),
        *refused(_SAFETENSORS, "export_legacy_format"),
        Row("export_hub_model_id", refused=_HUB),
        *unused("`fm9g generate --data DATA --output FILE.jsonl` answers records", "generation_max_length",
                "generation_num_beams", "generation_config", "eval_num_beams", "sortish_sampler",
                "predict_with_generate"),
        kept=("use_kt", "model_revision", "shift_attn", "mixture_of_depths", "use_llama_pro"),
    ),
    version="0.9.5",
)  # fmt: skip

# ms-swift: infer, deploy, app and export


def adapters(given: Given) -> Keys:
    """adapters: paths, or NAME=PATH; and merge_lora, which merges an adapter into the model first."""
    value = given["adapters"]
    paths = tuple(map(str, value if isinstance(value, list) else str(value or "").split()))
    if sum("=" not in path for path in paths) > 1:
        raise given.error("adapters", "several adapters need names, by which requests choose; write NAME=PATH")
    merges = given.flag("merge_lora")
    if merges and len(paths) != 1:
        raise given.error("merge_lora", f"adapters has {len(paths)}; give the one to merge")
    if merges or not given.text("model"):  # requests choose no adapter then
        paths = tuple(path.partition("=")[2] or path for path in paths)
    return {"merge_first": merges, **({"adapters": paths} if paths else {})}


def records(given: Given) -> Keys:
    """val_dataset, or a share of dataset: its records are answered; without any, a person chats."""
    share = given.number("split_dataset_ratio") or 0.0
    data = given["val_dataset"] or (given["dataset"] if share else None)
    if not data:
        if given["dataset"]:
            given.notes.append("dataset: only its share split_dataset_ratio is answered, which is 0")
        return {"verb": "chat"}
    keys: Keys = {"verb": "generate", "data": comma_list(data), "references": True}
    return keys if given["val_dataset"] else keys | {"val_split": share}


def new_tokens(given: Given) -> Keys:
    """max_new_tokens."""
    length = given.number("max_new_tokens")
    if length is None:
        given.notes.append("max_new_tokens: 2048; there an answer has no limit but that of the model")
    return {"max_new_tokens": int(length or 2048)}


def logprobs(given: Given) -> Keys:
    """logprobs and top_logprobs."""
    return {"logprobs": int(given.number("top_logprobs") or 0)} if given.flag("logprobs") else {}


def swift_backend(given: Given) -> Keys:
    """infer_backend, and the options of the backend: how many texts at once, and how long they may be."""
    name = given.choice("infer_backend", "transformers", "pt", "vllm", "sglang", "lmdeploy")
    if name in ("sglang", "lmdeploy"):
        raise given.error("infer_backend", f"{name} is not supported; write transformers or vllm")
    keys: Keys = {"backend": "vllm"} if name == "vllm" else {}
    at_once, length = given.number("max_batch_size"), given.number("max_model_len")
    if name == "vllm":
        at_once, length = given.number("vllm_max_num_seqs"), given.number("vllm_max_model_len") or length
        keys["gpu_memory_utilization"] = given.number("vllm_gpu_memory_utilization")
        keys["tensor_parallel_size"] = int(given.number("vllm_tensor_parallel_size") or 1)
    if at_once and at_once > 0:
        keys["max_num_seqs"] = int(at_once)
    return keys | ({"max_model_len": int(length)} if length else {})


def address(given: Given) -> Keys:
    """host and port; server_name and server_port of the web page, which has the address of the API here."""
    keys: Keys = {"host": given.first("host", "server_name"), "port": given.number("port")}
    if keys["port"] is None:
        keys["port"] = given.number("server_port")
    keys = {key: value for key, value in keys.items() if value not in (None, "")}
    if given.text("server_name") or given.text("server_port"):
        given.notes.append("server_name, server_port: the page is served with the API, under one address")
        keys["page"] = True
    return keys | ({"port": int(keys["port"])} if "port" in keys else {})


def swift_template(given: Given) -> Keys:
    """The chat template; that of the model's tokenizer where there is none of the name."""
    found = swift.template(given)
    return {} if found.get("chat_template") == "tokenizer" else found


def bitsandbytes(given: Given) -> Keys:
    """quant_method bnb and quant_bits: nf4 for 4 bits, int8 for 8. Without a method nothing is quantized."""
    if not given.text("quant_method"):
        if given["quant_bits"]:
            raise given.error("quant_bits", "has no effect there without quant_method; write bnb")
        return {}
    if given.text("quant_method").lower() != "bnb":
        raise given.error("quant_method", f"weights are quantized by bitsandbytes; write bnb. {_CALIBRATED}")
    return to.bits(given)


SWIFT_INFER = Dialect(
    "swift",
    "ms-swift (infer, deploy, app and export)",
    with_training(
        SWIFT,
        Row("model", "model", to.name, aliases=("model_id_or_path",)),
        Row("adapters", rule=adapters),
        Row("merge_lora", rule=adapters, default=False),
        Row("output_dir", "merge_to", to.name),
        Row("exist_ok", "overwrite", truth),
        Row("torch_dtype", "dtype", to.dtype, aliases=("dtype",)),
        Row("quant_method", rule=bitsandbytes),
        Row("quant_bits", rule=bitsandbytes),
        Row("bnb_4bit_quant_type", rule=bitsandbytes, default="nf4"),
        Row("bnb_4bit_use_double_quant", refused="4-bit weights always have double quantization", harmless=(True,)),
        Row("template", rule=swift_template),
        Row("use_chat_template", rule=swift_template),
        Row("system", "system", to.name),
        Row("seed", "seed", to.whole, default=42),
        # generation
        Row("max_new_tokens", rule=new_tokens),
        Row("temperature", rule=to.sampling),
        Row("top_k", rule=to.sampling),
        Row("top_p", rule=to.sampling),
        *SAMPLING,
        Row("stream", "stream", truth),
        Row("stop_words", "stop", to.texts, note="the words are not part of an answer; there they are"),
        Row("logprobs", rule=logprobs),
        Row("top_logprobs", rule=logprobs),
        Row("structured_outputs_regex", refused="texts are not constrained"),
        # records
        Row("val_dataset", rule=records),
        Row("dataset", rule=records),
        Row("split_dataset_ratio", rule=records, default=0.0),
        Row("data_seed", "split_seed", to.whole, default=42),
        Row("val_dataset_sample", "sample", to.number_or_all),
        *refused("give val_dataset, or the dataset of the training with split_dataset_ratio and data_seed",
                 "load_data_args"),
        *refused("records are answered in their order", "val_dataset_shuffle"),
        Row("result_path", "output", to.name),
        Row("write_batch_size", ignored="each answer is written at once"),
        Row("metric", refused="answers are written beside the references, not scored"),
        # backend
        Row("infer_backend", rule=swift_backend, default="transformers"),
        Row("max_batch_size", rule=swift_backend),
        Row("max_model_len", rule=swift_backend),
        Row("vllm_max_num_seqs", rule=swift_backend),
        Row("vllm_max_model_len", rule=swift_backend),
        Row("vllm_gpu_memory_utilization", rule=swift_backend, default=0.9),
        Row("vllm_tensor_parallel_size", rule=swift_backend, default=1),
        *unused("vLLM starts with its own default", "vllm_enforce_eager", "vllm_disable_custom_all_reduce",
                "vllm_max_lora_rank", "vllm_enable_prefix_caching", "vllm_use_async_engine",
                "vllm_disable_cascade_attn"),
        *(Row(name, refused=_VLLM_OPTION, harmless=(1, False)) for name in (
            "vllm_pipeline_parallel_size", "vllm_enable_expert_parallel", "vllm_data_parallel_size",
            "vllm_quantization", "vllm_reasoning_parser", "vllm_speculative_config", "vllm_engine_kwargs")),
        *unused("fm9g generates text from text", "vllm_limit_mm_per_prompt", "vllm_mm_processor_cache_gb",
                "lmdeploy_vision_batch_size", "is_multimodal"),
        *unused(_SGLANG, "lmdeploy_tp", "lmdeploy_session_len", "lmdeploy_cache_max_entry_count",
                "lmdeploy_quant_policy", *(f"sglang_{name}" for name in (
                    "tp_size", "pp_size", "dp_size", "ep_size", "enable_ep_moe", "mem_fraction_static",
                    "context_length", "disable_cuda_graph", "quantization", "kv_cache_dtype", "enable_dp_attention",
                    "disable_custom_all_reduce", "speculative_algorithm", "speculative_num_steps",
                    "speculative_eagle_topk", "speculative_num_draft_tokens"))),
        *unused("it is for models that rank", "reranker_use_activation"),
        *unused(_KERNELS, "attn_impl"),
        Row("rope_scaling", refused="the model's own configuration decides; edit its config.json"),
        Row("init_strategy", refused="weights that a model lacks are not made up"),
        Row("new_special_tokens", refused="the tokens of the model are used; train with new_tokens", harmless=([],)),
        Row("response_prefix", refused="write it into the chat template"),
        Row("ignore_args_error", refused="a wrong argument would have no effect, unseen", harmless=(False,)),
        # deploy and app
        Row("host", rule=address),
        Row("port", rule=address),
        Row("server_name", rule=address),
        Row("server_port", rule=address),
        Row("api_key", "api_key", to.name),
        Row("served_model_name", "served_model_name", to.name),
        *(Row(name, refused="HTTPS is for a proxy before it") for name in ("ssl_keyfile", "ssl_certfile")),
        *unused("the log has a line per request", "verbose", "log_interval", "log_level"),
        *unused("it is fm9g", "owned_by"),
        *unused("at most 20 log-probabilities are returned, as there", "max_logprobs"),
        Row("base_url", refused="`fm9g chat --url URL` talks to a server"),
        *unused("the page has its own words", "studio_title", "lang"),
        *refused("the page is not published", "share"),
        # export
        *unused(_SIZE, "max_shard_size"),
        Row("safe_serialization", refused=_SAFETENSORS, harmless=(True,)),
        *unused("nothing is calibrated", "quant_n_samples", "quant_batch_size", "group_size", "template_mode"),
        *refused("`fm9g data index` indexes records", "to_cached_dataset"),
        *refused("a merged folder is one that Ollama imports", "to_ollama"),
        *refused("`fm9g convert` knows the layouts; Megatron-Core is none of them", "to_mcore", "to_hf"),
        *unused("it is for Megatron-Core", "mcore_model", "mcore_adapter", "thread_count", "test_convert_precision",
                "test_convert_dtype", "save_missing_weights"),
        *refused(_HUB, "push_to_hub"),
        *unused("it is for push_to_hub", "hub_model_id", "hub_private_repo", "commit_message"),
        *unused("`fm9g lora export` writes PEFT's layout", "to_peft_format"),
        *unused("a prompt that does not fit is refused", "max_length", "truncation_strategy"),
        *unused("`fm9g generate --data DATA --output FILE.jsonl` answers records", "predict_with_generate"),
        kept=("model_revision", "task_type", "num_labels", "problem_type",
              "columns", "custom_dataset_info", "interleave_prob", "cached_dataset", "cached_val_dataset"),
    ),
    version="4.6",
)  # fmt: skip

# The scripts of Firefly and its descendants: chat.py, the demo, the service and the evaluation, whose arguments are
# constants in the files.


def script_adapter(given: Given) -> Keys:
    """adapter_name_or_path: an adapter, or none."""
    path = given.text("adapter_name_or_path")
    return {"adapters": (path,)} if path else {}


SCRIPTS_INFER = Dialect(
    "finetune-json",
    "the scripts of Firefly (chat, demo and service)",
    with_training(
        FINETUNE_JSON,
        Row("model_name_or_path", "model", to.name,
            aliases=("module_name_or_path", "model_dir", "base_model_path", "LLM_MODULE_MODEL_PATH")),
        Row("adapter_name_or_path", rule=script_adapter),
        Row("template_name", ignored="the chat template of the model is used; --chat_template gives another one"),
        Row("template_file", "chat_template", to.name),
        Row("load_in_4bit", rule=to.bits),
        Row("max_new_tokens", "max_new_tokens", to.whole, default=500),
        Row("do_sample", rule=to.sampling, default=True),
        Row("temperature", rule=to.sampling, default=0.35),
        Row("top_k", rule=to.sampling),
        Row("top_p", rule=to.sampling, default=0.9),
        Row("repetition_penalty", "repetition_penalty", to.number, default=1.0),
        Row("num_beams", refused=_BEAMS, harmless=(1,)),
        Row("attn_implementation", ignored=_KERNELS),
    ),
    file_argument="train_args_file",
)  # fmt: skip
