#!/bin/bash
#SBATCH --job-name=mlaan_r152 --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@180 --requeue --open-mode=append --output=%x-%j.log
# MLAAN, ResNet-152 in 51 modules, 150 epochs of ImageNet: batch 128 on one GPU.
source "${SLURM_SUBMIT_DIR:-.}/slurm/train.sh" recipes/mlaan_r152.yaml "$@"
