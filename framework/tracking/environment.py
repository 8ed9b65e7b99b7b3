"""What a number needs beside it to be compared: versions, commit, devices, ranks."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stagewise", "torch", "torchvision", "deepspeed", "timm", "numpy", "scikit-learn", "webdataset")


def environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """Of this process, for JSON."""
    return {
        "versions": versions(),
        "commit": commit(),
        "device": device_name(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "world_size": world_size,
    }


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the CPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    """The CPU's name; Python knows only its architecture on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Version of Python and of every package that can move a number."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # such as this package, where a checkout is run as it lies
        return "not installed"


def commit(root: Path = ROOT) -> str | None:
    """Commit of the checkout at ``root``, "-dirty" if edited; ``None`` if ``root`` is not one."""
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root:  # installed below somebody else's repository
            return None
        return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
