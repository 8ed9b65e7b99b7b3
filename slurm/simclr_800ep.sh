#!/bin/bash
#SBATCH --job-name=simclr_800ep --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@180 --requeue --open-mode=append --output=%x-%j.log
# SimCLR, ResNet-50, 800 epochs of ImageNet: batch 4096 over 32 GPUs.
source "${SLURM_SUBMIT_DIR:-.}/slurm/train.sh" recipes/simclr_r50_800ep.yaml "$@"
