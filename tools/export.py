"""A run's backbone in the formats of others: timm, torchvision, torch.export, ONNX; and a model card.

    python tools/export.py RUN [--out FOLDER]

FOLDER (RUN/export unless given) becomes what timm.create_model("local-dir:FOLDER", pretrained=True) loads; beside
the weights lie torchvision.safetensors (where torchvision has the network), backbone.pt2 (torch.export) and
backbone.onnx. Each is read back and compared with the checkpoint. It takes no images.
"""

from __future__ import annotations

import sys

from framework.analysis.arguments import only_run, parse, run_parser
from framework.runtime.command import status
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole


def main() -> None:
    """Export into every format that is possible, and say what was left out and why."""
    arguments = parse(run_parser(__doc__), "export")

    from framework.analysis import export

    run, folder = only_run(arguments.runs), arguments.out
    backbone = run.backbone()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: can't be made: {error.strerror}") from error
    export.export_timm(run, backbone, folder)
    print(f"{folder}: timm's local-dir:, compared")
    for name, write in (
        ("torchvision.safetensors", export.export_torchvision),
        ("backbone.pt2", export.export_program),
        ("backbone.onnx", export.export_onnx),
    ):
        try:
            write(run, backbone, folder / name)
            print(f"{folder / name}: written, compared")
        except UserError as error:
            (folder / name).unlink(missing_ok=True)
            print(f"{name}: left out: {error}")
    write_whole(folder / "README.md", export.model_card(run))
    print(f"{folder / 'README.md'}: the model card")


if __name__ == "__main__":
    sys.exit(status(main))
