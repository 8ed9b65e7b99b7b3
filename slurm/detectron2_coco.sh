#!/bin/bash
# Mask R-CNN on COCO over a run's frozen backbone: sbatch slurm/detectron2_coco.sh RUN_DIR [KEY VALUE ...]
# COCO lies below datasets, or DETECTRON2_DATASETS. One task: Detectron2 starts a process for each GPU of the node.
#SBATCH --job-name=detectron2_coco
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --time=24:00:00 --signal=TERM@60 --requeue --open-mode=append --output=%x-%j.log

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
run_dir=${1:?name the run folder: sbatch slurm/detectron2_coco.sh RUN_DIR}
shift
backbone=$run_dir/detectron2/backbone.pkl
mkdir -p "$run_dir/detectron2"
on_all_ranks tools/convert_to_detectron2.py "$run_dir" -o "$backbone" &&
  until_done "$run_dir/detectron2" '*.pth' tools/train_detectron2.py --resume --num-gpus "${SLURM_GPUS_ON_NODE:-1}" \
    --config recipes/detectron2/coco_1x_frozen.yaml MODEL.WEIGHTS "$backbone" OUTPUT_DIR "$run_dir/detectron2/coco_1x" "$@"
