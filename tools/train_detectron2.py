"""Train a Mask R-CNN on a converted backbone with Detectron2, and evaluate it.

    python tools/train_detectron2.py --config recipes/detectron2/coco_1x_frozen.yaml MODEL.WEIGHTS backbone.pkl

Everything after the options is KEY VALUE in Detectron2's configuration. OUTPUT_DIR holds the log, the checkpoints,
the predictions and result.json; --resume goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import sys

from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError


def main() -> int:
    """Launch; returns the exit status.

    Raises:
        UserError: Detectron2 is missing, or a mistake in what it was given.
    """
    arguments = _arguments()
    try:
        from detectron2.engine import launch
        from torch.multiprocessing import ProcessExitedException

        from framework.detection import trainer
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: recipes/detectron2/README.md says how to install Detectron2") from error
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


def _arguments() -> argparse.Namespace:
    """Detectron2's own options under its own names, read without it, and ``--split``."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", "--config-file", dest="config_file", required=True, metavar="FILE")
    parser.add_argument(
        "--split", type=bounded(int, 0), help="train on this subset of COCO, into OUTPUT_DIR/splitN"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, train nothing")
    parser.add_argument("--num-gpus", type=bounded(int, 1), default=1, help="on this machine; default: 1")
    parser.add_argument("--num-machines", type=bounded(int, 1), default=1, help="default: 1")
    parser.add_argument(
        "--machine-rank", type=bounded(int, 0), default=0, help="number of this machine; default: 0"
    )
    parser.add_argument("--dist-url", default="auto", help="where several machines meet, as tcp://HOST:PORT")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="over the file's values")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(status(main))
