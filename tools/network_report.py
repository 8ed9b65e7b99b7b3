"""Which of timm's networks can be cut, whether that is right, and what local learning saves on each.

    python tools/network_report.py                       one network of each of timm's modules, and some variants
    python tools/network_report.py resnet50 vit_tiny_patch16_224
    python tools/network_report.py --csv FILE --seconds 900
    python tools/network_report.py --cut-only            all of timm's: only whether each can be cut

For each: cut at stage and block, equal to the network in evaluation and training, trained by GIM, LoCo, DGL and MLAAN,
features equal to timm's, memory counted. Each runs in a process of its own. A table that is there is gone on with.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from framework.analysis.representatives import REPRESENTATIVES
from framework.runtime.command import Parser, bounded, status
from framework.runtime.errors import UserError
from framework.runtime.files import write_whole

COLUMNS = (
    *("network", "parameters_millions", "image_size", "cut_seconds", "stages", "blocks", "memory_size"),
    *("saving_gim", "saving_loco", "saving_dgl", "saving_mlaan", "faults", "reason"),
)


def main() -> None:
    """Check each network, print the table, write CSV.

    Raises:
        UserError: a network is cut wrongly, or its check did not end.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NAME", help="timm's names")
    parser.add_argument("--csv", type=Path, default=Path("runs/networks/networks.csv"), help="where rows go")
    parser.add_argument(
        "--seconds", type=bounded(float, 1e-3), default=600.0, help="limit for one network; default: 600"
    )
    parser.add_argument(
        "--cut-only", action="store_true", help="compute nothing; without NAME all of timm's networks"
    )
    arguments = parser.parse_args()
    if arguments.csv.is_dir():
        parser.error(f"--csv {arguments.csv}: is a folder")
    rows = _read(arguments.csv)
    names = arguments.networks or (_every() if arguments.cut_only else list(REPRESENTATIVES))
    for name in track([name for name in names if name not in rows], "networks"):
        rows[name] = _in_a_process(name, arguments.seconds, arguments.cut_only)
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.csv, _csv(rows))
    asked = [rows[name] for name in names]
    _show(asked, arguments.cut_only)
    if wrong := [row for row in asked if row["faults"]]:
        raise UserError(f"{len(wrong)} of {len(asked)} networks: {wrong[0]['network']}: {wrong[0]['faults']}")


def _every() -> list[str]:
    import timm

    return timm.list_models()


def _in_a_process(name: str, seconds: float, cut_only: bool) -> dict[str, Any]:
    """The row, or what is known of a process that has died or took too long."""
    from framework.analysis.network_checks import send_row

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["framework.analysis.network_checks"])  # imported once for all
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=send_row, args=(name, cut_only, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return {"network": name, "reason": "", "faults": f"did not end within {seconds:g} s"}
        found: dict[str, Any] = ours.recv()
        return found
    except EOFError:
        process.join()
        return {"network": name, "reason": "", "faults": f"its process died with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return {row["network"]: row for row in csv.DictReader(path.read_text().splitlines())}


def _csv(rows: dict[str, dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    return buffer.getvalue()


def _show(rows: list[dict[str, Any]], cut_only: bool) -> None:
    table = Table(title="networks, and how many times less memory activations take")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in COLUMNS))
    Console(width=180).print(table)
    cut = sum(bool(row.get("stages")) and not row["faults"] for row in rows)
    print(f"{cut} of {len(rows)} networks are cut" + ("" if cut_only else ", and equal"))


if __name__ == "__main__":
    sys.exit(status(main))
