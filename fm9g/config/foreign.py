"""What keys of transformers, PEFT, LLaMA-Factory and ms-swift are called here, for the message about an unknown key.

A value is a key of ours, a key with a value, or "nothing"; after a colon comes a remark.
"""

from __future__ import annotations

# Arguments that set several keys, or that stand in no table of fm9g.config.dialects.
TRAIN = {
    "additional_target": "modules_to_save",
    "auto_resume": "resume_ckpt auto",
    "bf16": "model.half_type bf16",
    "data_seed": "seed",
    "dataloader_num_proc": "dataloader_num_workers",
    "dataset": "data: files, folders and names in a dataset_info.json, with commas",
    "dataset_dir": "data: write DIR/NAME for a name in DIR/dataset_info.json",
    "deepspeed": "zero_level",
    "eval_dataset": "val_data",
    "eval_steps": "eval_iters",
    "evaluation_strategy": "eval_iters",
    "eval_strategy": "eval_iters",
    "finetuning_type": "lora_layer: adapters where it is given, else all weights",
    "fp16": "model.half_type fp16",
    "fsdp": "engine torch with zero_level",
    "init_weights": "init_lora_weights",
    "interleave_probs": "dataset_config: abs_weight of a dataset is its share",
    "lorap_lr_ratio": "loraplus_lr_ratio",
    "mask_history": "train_on last",
    "max_epochs": "epochs",
    "lora_dropout_p": "lora_dropout",
    "lora_rank": "lora_r",
    "lora_target": "lora_layer",
    "lora_target_modules": "lora_layer",
    "lr_scheduler_type": "lr_scheduler",
    "max_len": "max_length",
    "max_steps": "train_iters",
    "num_epochs": "epochs",
    "num_workers": "dataloader_num_workers",
    "per_device_train_batch_size": "batch_size: rows of max_length tokens, which are packed",
    "micro_batch_size": "batch_size: rows of max_length tokens, which are packed",
    "pissa_init": "init_lora_weights pissa",
    "pissa_iter": "init_lora_weights pissa_niter_16",
    "quant_bits": "quantization nf4, or int8",
    "quantization_bit": "quantization nf4, or int8",
    "quant_method": "quantization",
    "r": "lora_r",
    "torch_dtype": "model.half_type",
    "train_on_prompt": "train_on all",
    "run_name": "model_unique",
    "save_strategy": "save_iters",
    "stage": "nothing: records with an input are finetuning, text alone is pretraining",
    "target_modules": "lora_layer",
    "tensor_model_parallel_size": "tp_size",
    "tokenizer": "tokenizer_path",
    "train_batch_size": "batch_size: rows of max_length tokens, which are packed",
    "train_dataset": "data: files, folders and names in a dataset_info.json, with commas",
    "train_type": "lora_layer: adapters where it is given, else all weights",
    "tuner_type": "lora_layer: adapters where it is given, else all weights",
    "sft_type": "lora_layer: adapters where it is given, else all weights",
    "use_8bit_adam": "optimizer adamw8bit",
    "use_flash_attention_2": "flash",
    "use_pissa": "init_lora_weights pissa",
    "split_dataset_ratio": "val_split: a share of the records of data",
    "warmup_steps": "warmup_iters",
}
MODEL = {
    "attention_multiplier": "attention_scale",
    "dtype": "half_type",
    "embedding_multiplier": "scale_emb",
    "head_dim": "dim_head",
    "hidden_act": "activate_fn",
    "hidden_size": "dim_model",
    "initializer_range": "init_std",
    "intermediate_size": "dim_ff",
    "max_position_embeddings": "max_length",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_kv_heads",
    "original_max_position_embeddings": "orig_max_length",
    "rms_norm_eps": "eps",
    "rope_theta": "base",
    "tie_word_embeddings": "tie_lm_head",
    "torch_dtype": "half_type",
}
DATASET = {
    "columns": "nothing: `fm9g data index --columns` takes it",
    "dataset_path": "path",
    "file_name": "path: the folder that `fm9g data index` makes of a file",
    "name": "task_name",
    "num_samples": "sample",
    "probability": "abs_weight",
    "transform": "transforms",
}
_QKV = ("project_q", "project_k", "project_v")
# Linear layers of other families -> those of ours that hold the same weights.
LAYERS = {
    **dict.fromkeys(("c_attn", "query_key_value", "W_pack", "qkv_proj", "wqkv", "qkv"), _QKV),
    **dict.fromkeys(("q_proj", "wq"), ("project_q",)),
    **dict.fromkeys(("k_proj", "wk"), ("project_k",)),
    **dict.fromkeys(("v_proj", "wv"), ("project_v",)),
    **dict.fromkeys(("o_proj", "wo", "dense", "out_proj"), ("attention_out",)),
    **dict.fromkeys(("gate_proj", "w1"), ("w_0",)),
    **dict.fromkeys(("up_proj", "w3"), ("w_1",)),
    **dict.fromkeys(("down_proj", "w2", "dense_4h_to_h"), ("w_out",)),
    **dict.fromkeys(("gate_up_proj", "dense_h_to_4h"), ("w_0", "w_1")),
}


def train_hints() -> dict[str, str]:
    """What training keys of other tools are called here: those of TRAIN, then those of the dialects."""
    from fm9g.config.dialects.translate import dialects

    hints: dict[str, str] = {}
    for dialect in dialects().values():
        for name, row in dialect.by_name.items():
            if row.ours or row.ignored:
                hints.setdefault(name, row.ours or f"nothing: {row.ignored}")
    return hints | TRAIN
