#!/usr/bin/env bash
# Trains on a SLURM cluster, one task a GPU:
#
#     cd apps/fm9g_7b && sbatch --nodes=4 ../slurm.sh --config 7b --dataset_config data_test --tokenizer_path ./ckpt
#
# To set: the lines below, and how the environment of fm9g is activated. Ask for GPUs by node, not by task: each process
# takes the GPU of its number among those of its node, so it must see them all.
#SBATCH --job-name=fm9g
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Ten minutes before that, save and stop; the same command then goes on from there:
#SBATCH --signal=TERM@600
#SBATCH --output=slurm-%j.log

# conda activate fm-9g

# Who holds this may take part in the run, and nobody else.
export FM9G_SECRET="${FM9G_SECRET:-$(fm9g train --print-secret)}"

# fm9g finds the other processes, their master and its port (from the number of the job) in SLURM's variables.
exec srun --cpus-per-task="$SLURM_CPUS_PER_TASK" fm9g train --resume auto "$@"

# Or one task a node, whose fm9g starts the others, so that --max-restarts works. In place of the line above:
# exec srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=64 \
#     fm9g train --resume auto --nproc 8 --max-restarts 3 "$@"
