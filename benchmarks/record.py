"""What every result says of itself: the machine, the commit, and where it is kept."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


def machine() -> str:
    """Processor, cores and GPUs, as the system names them."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    parts = [f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores"]
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        parts += subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    return ", ".join(parts)


def commit() -> str:
    """The commit measured, marked when the tree was not clean."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True
    )
    return described.stdout.strip()
