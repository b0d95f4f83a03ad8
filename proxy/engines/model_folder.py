"""Finds or creates the model's folder in a separate process, so that the gateway never imports torch.

`python -I model_folder.py NAME CACHE_DIR [REVISION]` prints progress lines and, last, the folder.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

from interpretops.errors import ModelError
from interpretops.model.source import resolve_model
from interpretops.settings import Settings
from proxy.process.child_environment import child_environment

_FOLDER = "folder: "
_FAULT = "fault: "


async def find_model(settings: Settings, progress: Callable[[str], None]) -> Path:
    """The folder of `model.name`, created or downloaded first if needed. Raises `ModelError`."""
    model = settings.model
    arguments = [model.name, str(settings.cache.dir), *([model.revision] if model.revision else [])]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", __file__, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(os.environ, fetches=True),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    faults: list[str] = []
    try:
        folder, stderr = await asyncio.gather(
            _read_lines(process.stdout, progress, faults), process.stderr.read()
        )
        if folder is not None:
            return folder
        last = stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise ModelError("\n".join(faults) or f"model.name = {model.name!r} could not be prepared: {last[0]}")
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _read_lines(
    lines: asyncio.StreamReader, progress: Callable[[str], None], faults: list[str]
) -> Path | None:
    folder = None
    async for raw in lines:
        line = raw.decode(errors="replace").rstrip("\n")
        if line.startswith(_FOLDER):
            folder = Path(line.removeprefix(_FOLDER))
        elif line.startswith(_FAULT):
            faults.append(line.removeprefix(_FAULT))
        elif line:
            progress(line)
    return folder


def main(arguments: list[str]) -> int:
    """Entry point of the separate process."""
    name, cache_dir, *revision = arguments

    def show(line: str) -> None:
        print(line, flush=True)  # noqa: T201 - read by `find_model`

    try:
        folder = resolve_model(name, Path(cache_dir), show, revision=revision[0] if revision else None)
    except ModelError as error:
        for line in str(error).splitlines():
            show(_FAULT + line)
        return 1
    show(f"{_FOLDER}{folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
