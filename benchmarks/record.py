"""Metadata of every result: the machine, the commit, and where it is stored."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interpretops.machine import machine_name as machine

__all__ = ["RESULTS", "UNKNOWN", "commit", "machine", "write"]

RESULTS = Path(__file__).with_name("results")
UNKNOWN = "unknown"


def commit() -> str:
    """The measured commit, marked if the tree was dirty; `unknown` outside a checkout."""
    root = Path(__file__).parents[1]
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (root / ".git").exists():
        # An archive, perhaps inside another project's checkout.
        return UNKNOWN
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def write(name: str, result: Mapping[str, Any]) -> None:
    """Write a result for the documents that quote it. If that fails, the result was printed anyway."""
    path = RESULTS / f"{name}.json"
    try:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        print(f"{path}: not written ({error.strerror})", file=sys.stderr)
