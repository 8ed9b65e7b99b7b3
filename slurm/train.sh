#!/bin/bash
#SBATCH --job-name=train --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@180 --requeue --open-mode=append --output=%x-%j.log
# Train a recipe: sbatch [--nodes 4 ...] slurm/train.sh RECIPE [key=value ...]

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
recipe=${1:?name the recipe: sbatch slurm/train.sh RECIPE}
shift
name=$(basename "$recipe" .yaml) run_dir=
for argument in "$@"; do
  case $argument in
    name=*) name=${argument#name=} ;;
    run_dir=*) run_dir=${argument#run_dir=} ;;
  esac
done
run_dir=${run_dir:-${RUNS:-runs}/$name}
until_done "$run_dir" '*/checkpoints/step-*/state.json' framework/train.py "$recipe" \
  faults.nonfinite=skip ${DATA:+data.path="$DATA"} run_dir="$run_dir" "$@"
