"""What every result says of itself: the machine, the commit, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
UNKNOWN = "unknown"


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
        done = subprocess.run(asked, check=False, capture_output=True, text=True)
        # The tool may be there without a GPU.
        parts += done.stdout.splitlines() if done.returncode == 0 else []
    return ", ".join(parts)


def commit() -> str:
    """The commit measured, marked when the tree was not clean; `unknown` outside a checkout of it."""
    root = Path(__file__).parents[1]
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (root / ".git").exists():
        # An archive, perhaps inside a checkout of something else.
        return UNKNOWN
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def write(name: str, result: Mapping[str, Any]) -> None:
    """Keep a result for the documents that quote it; one that cannot be kept was shown all the same."""
    path = RESULTS / f"{name}.json"
    try:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        print(f"{path}: not written ({error.strerror})", file=sys.stderr)
