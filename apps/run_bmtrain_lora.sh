#!/usr/bin/env bash
# Trains LoRA adapters of the size that this folder is called after: launch.sh says how.
. "$(dirname -- "$0")/launch.sh" || exit

# Keys of the run, as in the guide: `fm9g config keys` lists them. train_configs/ wins over them, --key value over both.
args["pretrained_model"]="./9g_models/$size.pt" # the base of the adapters
args["resume_ckpt"]=""      # the step of a checkpoint of this run to go on from
args["tokenizer_path"]="./ckpt"
args["dataset_config"]="data_test" # a name in dataset_configs/

# All sizes share this file: edit a copy of it (cp run_bmtrain_lora.sh run_bmtrain_lora_node_1.sh).
GPUS_PER_NODE=${GPUS_PER_NODE:-}     # processes on this machine; else the key n_gpus of train_configs/
NNODES=${NNODES:-}                   # number of machines; else 1
RANK=${RANK:-}                       # which of them this one is: 0 is the master, then 1, 2, 3 ...
MASTER_ENDPOINT=${MASTER_ENDPOINT:-} # name or address of the master
MASTER_PORT=${MASTER_PORT:-}         # a free port of the master; else 29500
train "_lora" "$@"
