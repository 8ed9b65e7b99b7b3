"""Time and memory of one training step of a local method, against end-to-end backpropagation.

    python tools/bench_step.py --network resnet32 --method mlm --window 2 --batch 64
    python tools/bench_step.py --network resnet50 --image-size 224 --method gim,loco --batch 256 \\
        --precision bf16 --channels-last --csv loco.csv
    python tools/bench_step.py --network resnet110 --modules 55 --method mlaan --batch 128 --cuda-graph --csv mlaan.csv

Networks take turns in one process: end-to-end (BP, or SimCLR for a contrastive method; one forward and one backward of
the whole network, which is one segment), the routed step, and the definition that runs the segments of every window
again. --cuda-graph and --compile serve the first two; in place of the third the routed step then runs without it, too,
and gives the speed-up. Each ratio is the median over rounds of a time to the end-to-end time of the same round; on a
GPU a round is ten steps of each. Activations are counted, not sampled. On a GPU come the allocator's peak (without
--cuda-graph), and the share of the step's time in which the GPU is busy. There fp32 means fp32: TF32, in which cuDNN
computes convolutions by default, is off. With an objective as its --head a method is also compared with itself under
InfoNCE and one forward pass more, of all images through the network, in time and in FLOPs. Behind a method +segment or
+block says what is run again in place of keeping its activations (execution.recompute); end-to-end keeps all. Rows that
--csv holds already are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from framework.runtime.command import Parser, bounded, status
from framework.runtime.files import write_whole


def conditions(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What tells a row of the CSV from the others."""
    import torch

    from framework.network import create
    from framework.network.cifar import CifarResNet
    from framework.tracking.environment import environment

    cifar = isinstance(create(arguments.network), CifarResNet)
    here = environment(1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "network": arguments.network,
        "method": method,
        "cut": f"K={arguments.modules}"
        if arguments.modules
        else arguments.cut or ("block" if cifar else "stage"),
        "window": arguments.window if method.partition("+")[0] in ("loco", "mlm", "mlaan") else "",
        "head": arguments.head,
        "image_size": arguments.image_size or (32 if cifar else 128),
        "precision": arguments.precision,
        "channels_last": arguments.channels_last,
        "cuda_graph": arguments.cuda_graph,
        "compile": arguments.compile,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "device": here["device"],
        "threads": here["threads"],
        "torch": torch.__version__,
    }


def row(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    import torch
    from benched_steps import (
        CLASSES,
        CONTRASTIVE,
        OBJECTIVES,
        build,
        flops,
        forward_step,
        graphed_step,
        head_times,
        measure,
        naive_step,
        peak_activations,
        routed_step,
    )

    from framework.analysis.gpu import allocator_peak, busy_seconds
    from framework.data.batch import Batch
    from framework.tracking.environment import commit

    setting = conditions(method, arguments)
    size, cut = setting["image_size"], arguments.modules or setting["cut"]
    views = 2 if method.partition("+")[0] in CONTRASTIVE else 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(arguments.batch, 3, size, size, device=device)
    if arguments.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (arguments.batch,), device=device)
    batch = Batch(images, None, 2) if views == 2 else Batch(images, labels)
    reference = build("simclr" if views == 2 else "bp", arguments, size, 1).to(device)
    network = build(method, arguments, size, cut).to(device)
    activations = peak_activations(network, batch) / peak_activations(reference, batch)
    quicker = arguments.cuda_graph or arguments.compile
    steps = {}
    if quicker:
        steps["eager"] = routed_step(copy.deepcopy(network), batch)
    elif not arguments.no_naive:
        steps["naive"] = naive_step(copy.deepcopy(network), batch)
    networks = {"reference": reference, "routed": network}
    if arguments.head in OBJECTIVES:
        by_infonce = argparse.Namespace(**{**vars(arguments), "head": "paper"})
        networks["infonce"] = build(method, by_infonce, size, cut).to(device)
        steps["forward"] = forward_step(networks["infonce"], images)
    for name, net in networks.items():
        if arguments.compile:
            net.compile_segments()
        # Without windows to repeat the definition is plain backpropagation.
        plain = naive_step if name == "reference" and not quicker else routed_step
        steps[name] = (graphed_step if arguments.cuda_graph else plain)(net, batch)
    times = dict(zip(steps, measure(list(steps.values()), arguments.rounds), strict=True))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, times["reference"], strict=True))
        for name, values in times.items()
    }
    taught: dict[str, Any] = {}
    if arguments.head in OBJECTIVES:
        rounds = zip(times["routed"], times["infonce"], times["forward"], strict=True)
        taught["ratio_time_infonce"] = statistics.median(a / (b + c) for a, b, c in rounds)
        counts = {name: flops(steps[name]) for name in ("routed", "infonce", "forward")}
        taught["ratio_flops_infonce"] = counts["routed"] / (counts["infonce"] + counts["forward"])
    images_per_step = arguments.batch // views
    gpu: dict[str, Any] = {}
    if device == "cuda":
        for name, key in (("reference", "reference_busy"), ("routed", "busy")):
            gpu[key] = busy_seconds(steps[name]) / seconds[name]
        if not arguments.cuda_graph:  # whose memory is its own for good
            peaks = [
                allocator_peak(steps[name], net)
                for name, net in (("reference", reference), ("routed", network))
            ]
            gpu |= {
                "reference_peak_bytes": peaks[0],
                "peak_bytes": peaks[1],
                "ratio_peak": peaks[1] / peaks[0],
            }
    return {
        **setting,
        "segments": len(network.segments),
        "units": len(network.plan.units),
        "reference": "simclr" if views == 2 else "bp",
        "reference_seconds": seconds["reference"],
        "reference_images_per_second": images_per_step / seconds["reference"],
        "images_per_second": images_per_step / seconds["routed"],
        "ratio_time": ratios["routed"],
        "speedup": statistics.median(a / b for a, b in zip(times["eager"], times["routed"], strict=True))
        if quicker
        else None,
        "ratio_time_naive": ratios.get("naive"),
        "ratio_peak_activations": activations,
        "spread": (max(times["routed"]) - min(times["routed"])) / seconds["routed"],
        **taught,
        **gpu,
        "commit": commit(),
        "heads": head_times(network, batch, arguments.rounds) if arguments.breakdown else None,
    }


def show_breakdown(result: dict[str, Any]) -> None:
    """Print what each head takes of the end-to-end step."""
    table = Table(title=f"heads of {result['method']} on {result['network']}, share of an end-to-end step")
    for column in ("unit", "parameters", "ms", "share"):
        table.add_column(column, justify="left" if column == "unit" else "right")
    total = {key: sum(cost[key] for cost in result["heads"]) for key in ("parameters", "seconds")}
    for cost in [*result["heads"], {"unit": "all", **total}]:
        share = cost["seconds"] / result["reference_seconds"]
        table.add_row(cost["unit"], str(cost["parameters"]), f"{cost['seconds'] * 1000:.1f}", f"{share:.3f}")
    Console(width=110).print(table)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table(title="one training step, ratio to end-to-end")
    for column in (
        "network",
        "K",
        "method",
        "window",
        "head",
        "batch",
        "end-to-end",
        "time",
        "repeated",
        "activations",
        "peak",
        "less",
        "images/s",
        "speed-up",
        "GPU busy",
        "InfoNCE + forward",
    ):
        table.add_column(column, justify="left" if column in ("network", "method", "head") else "right")
    for r in rows:
        table.add_row(
            f"{r['network']} @ {r['image_size']}",
            r["cut"].removeprefix("K="),
            r["method"],
            str(r["window"] or "-"),
            r["head"],
            str(r["batch"]),
            f"{r['reference']} {r['reference_seconds'] * 1000:.0f} ms",
            f"{r['ratio_time']:.2f}",
            f"{r['ratio_time_naive']:.2f}" if r["ratio_time_naive"] else "-",
            f"{r['ratio_peak_activations']:.3f}",
            *(
                (f"{r['peak_bytes'] / 2**30:.2f} GiB", f"{1 / r['ratio_peak']:.2f}x")
                if "ratio_peak" in r
                else ("-", "-")
            ),
            f"{r['images_per_second']:.0f}",
            f"{r['speedup']:.2f}" if r["speedup"] else "-",
            f"{r['busy']:.2f}" if "busy" in r else "-",
            f"{r['ratio_time_infonce']:.2f} ({r['ratio_flops_infonce']:.2f} of FLOPs)"
            if "ratio_time_infonce" in r
            else "-",
        )
    Console(width=184).print(table)


def argument_parser() -> Parser:
    """Of what is measured, and of where the rows go."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet32", help="any ResNet of timm or of depth 6n+2")
    parser.add_argument(
        "--method",
        default="mlm",
        help="some of bp simclr gim loco dgl infopro auglocal man hpff mlm lam mlaan, with commas; bp+segment, "
        "bp+block and so on: activations computed again",
    )
    parser.add_argument(
        "--window", type=bounded(int, 1), default=2, help="segments in a window (loco, mlm, mlaan)"
    )
    parser.add_argument(
        "--head",
        default="paper",
        help="the method's own head (paper); simclr, gim, loco: or gap, pooling and a linear layer, or moco, mocov3, "
        "byol, simsiam, its own blocks under this objective; dgl, infopro: or a kind of classifier, such as 1c2f",
    )
    parser.add_argument(
        "--cut", choices=("stage", "block"), help="default: blocks for CIFAR networks, stages for others"
    )
    parser.add_argument("--modules", type=bounded(int, 1), help="K as the papers count it, in place of --cut")
    parser.add_argument(
        "--image-size", type=bounded(int, 1), help="default: 32 for CIFAR networks, 128 for others"
    )
    parser.add_argument(
        "--batch", type=bounded(int, 2), default=64, help="images in a step (both views counted)"
    )
    parser.add_argument(
        "--rounds", type=bounded(int, 1), default=7, help="measured rounds, after two to warm up"
    )
    parser.add_argument("--breakdown", action="store_true", help="also print what each head takes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all networks")
    parser.add_argument("--cuda-graph", action="store_true", help="replay the steps from CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="compile the segments")
    parser.add_argument("--no-naive", action="store_true", help="leave the repeated forwards out")
    parser.add_argument("--channels-last", action="store_true", help="all networks in channels-last order")
    parser.add_argument("--threads", type=bounded(int, 1), default=1, help="CPU threads")
    parser.add_argument(
        "--wire",
        type=bounded(float, 0, 0.9),
        help="in place of the rest: what part of the communication between ranks is hidden behind computation, on a "
        "wire that takes this share of a step in which none is, and no processor",
    )
    parser.add_argument(
        "--ranks", type=bounded(int, 1), default=1, help="the same over gloo, between so many processes"
    )
    parser.add_argument(
        "--zero-stage",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="the same under ZeRO, in place of engine=ddp",
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--csv", type=Path, help="add them here, without what --breakdown adds")
    return parser


def set_up(arguments: argparse.Namespace) -> None:
    """Of the whole process: float32 is float32, and the threads are those asked for."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(arguments.threads)


def main() -> None:
    """Parse, measure, print."""
    parser = argument_parser()
    arguments = parser.parse_args()

    import torch
    from benched_steps import check
    from csv_rows import append, is_in

    if arguments.cuda_graph and (arguments.compile or not torch.cuda.is_available()):
        parser.error("--cuda-graph needs a GPU, and can't be combined with --compile")
    for path in (arguments.json, arguments.csv):
        if path and path.is_dir():
            parser.error(f"{path}: is a folder")
    methods = arguments.method.split(",")
    for method in methods:
        check(method, arguments.head)
    if "+" in arguments.method and (arguments.cuda_graph or arguments.compile):
        parser.error("what is run again goes neither with --cuda-graph nor with --compile")
    set_up(arguments)
    if arguments.wire or arguments.ranks > 1:
        import wired_steps

        found = wired_steps.rows(methods, arguments)
        wired_steps.show(found)
        if arguments.json:
            write_whole(arguments.json, json.dumps(found, indent=1) + "\n")
        return
    rows = []
    for method in methods:
        if arguments.csv and is_in(arguments.csv, conditions(method, arguments)):
            print(f"{method}: is in {arguments.csv} already")
            continue
        rows.append(row(method, arguments))
        if arguments.csv:
            append(arguments.csv, rows[-1])
    if rows:
        show(rows)
    for result in rows if arguments.breakdown else ():
        show_breakdown(result)
    if arguments.json:
        write_whole(arguments.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(status(main))
