#!/bin/bash
# Linear evaluation of a run, after LoCo's protocol: sbatch slurm/linear_eval.sh RUN_DIR [option or key=value ...]
#SBATCH --job-name=linear_eval
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=TERM@60 --requeue --open-mode=append --output=%x-%j.log

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
run_dir=${1:?name the run folder: sbatch slurm/linear_eval.sh RUN_DIR}
until_done "$run_dir" '*/linear_eval/*.safetensors' tools/linear_eval.py "$@" ${DATA:+data.path="$DATA"}
