#!/bin/bash
#SBATCH --job-name=mlaan_r101 --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@180 --requeue --open-mode=append --output=%x-%j.log
# MLAAN, ResNet-101 in 34 modules, 150 epochs of ImageNet: batch 128 on one GPU.
source "${SLURM_SUBMIT_DIR:-.}/slurm/train.sh" recipes/mlaan_r101.yaml "$@"
