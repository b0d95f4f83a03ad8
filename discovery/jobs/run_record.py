"""The record that makes a run repeatable: commit, seed, settings, data, versions, machine."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("interpretops", "torch", "transformers", "sae-lens", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The git commit of this source tree, with ``+`` if files differ from it; "unknown" without git."""
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
    """The record of a run that starts now; the job adds its results."""
    return {
        "job": job,
        "commit": commit(),
        "seed": seed,
        "settings": settings,
        "data": data,
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
