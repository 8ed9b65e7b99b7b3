"""Train a Mask R-CNN on a converted backbone with Detectron2, and evaluate it.

    python tools/train_detectron2.py --config recipes/detectron2/coco_1x_frozen.yaml MODEL.WEIGHTS backbone.pkl

Everything after the options is KEY VALUE in Detectron2's configuration. OUTPUT_DIR holds the log, the checkpoints,
the predictions and result.json; --resume goes on from its last checkpoint.
"""

from __future__ import annotations

import sys

from torch.multiprocessing import ProcessExitedException

from framework.runtime.command import status
from framework.runtime.errors import UserError


def main() -> int:
    """Launch; returns the exit status."""
    try:
        from detectron2.engine import default_argument_parser, launch

        from framework.detection import trainer
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: recipes/detectron2/README.md says how to install Detectron2") from error
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--split", type=int, help="train on this subset of COCO, into OUTPUT_DIR/splitN")
    arguments = parser.parse_args()
    if not arguments.config_file:
        parser.error("--config is needed, such as recipes/detectron2/coco_1x_frozen.yaml")
    trainer.prepare(arguments)
    try:
        launch(
            trainer.work,
            arguments.num_gpus,
            arguments.num_machines,
            arguments.machine_rank,
            arguments.dist_url,
            (arguments,),
        )
    except ProcessExitedException as error:
        if error.exit_code < 0:  # a signal, of which the process itself can't tell
            raise
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(status(main))
