"""Makes the lock files out of pyproject.toml and tells when they no longer match. Standard library only."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PYPROJECT = FOLDER.parent / "pyproject.toml"
OVERRIDES = FOLDER / "overrides.txt"
EXTRAS = {
    "cpu": ("cpu", "model", "discovery", "tracing", "redis", "transcripts", "s3", "test", "dev"),
    "gateway": ("redis", "transcripts"),
}
"""What each lock file covers beyond the package's own dependencies."""
BUILD = "build"
"""A lock of its own: what builds the package, `build-system.requires`."""
PYTHON_VERSION = "3.11"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
MARK = "# inputs: sha256:"


def lock_file(name: str) -> Path:
    return FOLDER / f"{name}.txt"


def inputs_digest(name: str) -> str:
    """sha256 of all that a lock follows from: the requirements in pyproject.toml and the overrides."""
    pyproject = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    if name == BUILD:
        return _digest(pyproject["build-system"])
    project = pyproject["project"]
    inputs = {
        "requires-python": project["requires-python"],
        "dependencies": project["dependencies"],
        "extras": {extra: project["optional-dependencies"][extra] for extra in EXTRAS[name]},
        "overrides": [line for line in OVERRIDES.read_text(encoding="utf-8").splitlines() if line[:1] != "#"],
    }
    return _digest(inputs)


def recorded_digest(name: str) -> str | None:
    """The digest that stands in a lock file's header."""
    for line in lock_file(name).read_text(encoding="utf-8").splitlines():
        if line.startswith(MARK):
            return line.removeprefix(MARK)
    return None


def install_key() -> str:
    """Changes whenever an installation made before may no longer be what the repository asks for."""
    pyproject = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    parts = [pyproject["build-system"], pyproject["project"], pyproject["tool"]["hatch"]]
    return _digest([lock_file("cpu").read_text(encoding="utf-8"), *parts])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_lock(name: str) -> None:
    """Resolve anew, keeping pins that still fit; the file is replaced only when uv has succeeded."""
    path = lock_file(name)
    draft = path.with_suffix(".draft")
    draft.write_bytes(path.read_bytes() if path.exists() else b"")
    uv = Path(sys.executable).with_name("uv")
    source = "-" if name == BUILD else str(PYPROJECT.name)
    command = [str(uv), "pip", "compile", source, "--quiet", "--output-file", str(draft)]
    if name != "cpu":  # the same versions in every lock
        command += ["--constraint", str(lock_file("cpu").relative_to(FOLDER.parent))]
    command += [word for extra in EXTRAS.get(name, ()) for word in ("--extra", extra)]
    wanted = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["build-system"]["requires"]
    command += ["--override", str(OVERRIDES.relative_to(FOLDER.parent)), "--python-version", PYTHON_VERSION]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--generate-hashes"]
    command += ["--no-emit-index-url", "--no-emit-find-links", "--custom-compile-command", "make lock"]
    environment = dict(os.environ)
    # Where pip is told to look for torch's CPU build, uv looks too; else PyTorch's own index.
    if found := environment.get("UV_FIND_LINKS") or environment.get("PIP_FIND_LINKS"):
        environment["UV_FIND_LINKS"] = found
    elif "cpu" in EXTRAS.get(name, ()):
        command += ["--extra-index-url", TORCH_INDEX, "--index-strategy", "unsafe-best-match"]
    try:
        subprocess.run(  # noqa: S603  # fixed words
            command,
            cwd=FOLDER.parent,
            env=environment,
            input="\n".join(wanted) if name == BUILD else "",
            text=True,
            check=True,
        )
        text = draft.read_text(encoding="utf-8")
        draft.write_text(f"{MARK}{inputs_digest(name)}\n{text}", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def main() -> int:
    """`lock.py` makes the locks, `lock.py check` compares, `lock.py key` prints the installation's key."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", nargs="?", choices=("make", "check", "key"), default="make")
    action = parser.parse_args().action
    if action == "key":
        sys.stdout.write(install_key() + "\n")
        return 0
    if action == "make":
        for name in (*EXTRAS, BUILD):
            sys.stderr.write(f"resolving locks/{name}.txt\n")
            make_lock(name)
    stale = [name for name in (*EXTRAS, BUILD) if recorded_digest(name) != inputs_digest(name)]
    for name in stale:
        sys.stderr.write(f"locks/{name}.txt no longer follows from pyproject.toml; run: make lock\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
