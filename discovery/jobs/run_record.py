"""What a job writes down so that another can repeat it: commit, command, seeds, data, versions, machine."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from discovery.errors import DiscoveryError
from interpretops.files.atomic_file import write_atomically

PACKAGES = ("interpretops", "torch", "transformers", "sae-lens", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The git commit of this source tree with ``+`` when files differ from it; "unknown" outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(
            root, "status", "--porcelain", "--untracked-files=no", "--", "discovery", "interpretops"
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)  # noqa: S603
    return done.stdout.strip()


def run_record(job: str, seed: int, settings: dict[str, Any], data: Any) -> dict[str, Any]:
    """The record of a run that begins now; the job adds its results."""
    return {
        "job": job,
        "commit": commit(),
        "seed": seed,
        "settings": settings,
        "data": data,
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a full disk ends in one line."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise DiscoveryError(
            f"{path}: cannot be written ({error.strerror or error}); what is finished stands: "
            "free space, and run the same command again"
        ) from error


def write_json(path: Path, record: Any) -> None:
    """Write a record whole or not at all."""
    write_file(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
