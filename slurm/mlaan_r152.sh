#!/bin/bash
# MLAAN, ResNet-152 in 51 modules, 150 epochs of ImageNet: batch 128 on one GPU.
#SBATCH --job-name=mlaan_r152
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@180 --requeue --open-mode=append --output=%x-%j.log

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
train recipes/mlaan_r152.yaml faults.nonfinite=skip "$@"
