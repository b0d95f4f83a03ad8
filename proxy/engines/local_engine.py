"""One local engine: starts it on a private socket, watches it, and ends it with all its child processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from interpretops.settings import Settings
from proxy.engines.command import engine_command, engine_environment

_GRACE_S = 10.0
_SOCKET = "engine.sock"
_REAPER = Path(__file__).parents[1] / "process" / "process_reaper.py"
_CAUSE = re.compile(
    r"Value error, (?P<field>.+?)(?: \[type=|$)"
    r"|(?:^|[\])] )(?P<raised>[A-Za-z_.]*(?:Error|Exception): \S.*)"
    r"|: error: (?P<flag>.+)"
)
_HEADING = re.compile(r"validation errors? for")
"""The heading of a list of errors, not an error itself."""


class LocalEngine:
    """An engine in its own processes. Each instance has its own socket, so that a connection to one instance
    can never reach its successor."""

    own: bool = True

    def __init__(self, settings: Settings, model: Path, log_file: Path) -> None:
        self._settings = settings
        self._model = model
        self.log_file = log_file
        self._folder: Path | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        """Where the engine listens."""
        assert self._folder is not None
        return f"unix://{self._folder / _SOCKET}"

    @property
    def pid(self) -> int | None:
        """The reaper's process id, which is also the id of the engine's process group."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the processes; returns long before the engine answers."""
        # mkdtemp: readable by our user only. Short: a unix socket path has at most 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="iops-"))
        command = engine_command(self._settings, self._model, self._folder / _SOCKET)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.log_file.replace(self.log_file.with_suffix(".previous.log"))
        descriptor = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                # By file and with -I: a folder `proxy` in the working directory must not shadow ours.
                *(sys.executable, "-I", str(_REAPER), str(_GRACE_S), str(self._folder)),
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=descriptor,
                stderr=descriptor,
                env=engine_environment(self._settings, self._folder),
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    async def wait_gone(self) -> str:
        """Wait for the engine to exit; returns why, in one line."""
        assert self._process is not None
        status = await self._process.wait()
        cause = self._cause()
        return f"engine exited with status {status}{f': {cause}' if cause else ''}; see {self.log_file}"

    def _cause(self) -> str | None:
        """The first error in the log, the most likely reason."""
        try:
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return None
        found = (match for line in lines if (match := _CAUSE.search(line)) and not _HEADING.search(line))
        return next((match.group(match.lastgroup or 0).strip(" .")[:400] for match in found), None)

    async def stop(self) -> None:
        """Stop the engine gracefully, then kill the whole process group."""
        process = self._process
        try:
            if process is not None:
                await asyncio.shield(_end(process))
        finally:
            # The reaper does this too, unless it was killed.
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(_GRACE_S + 5):
            await process.wait()
    except TimeoutError:
        pass
    # Works even if the reaper was killed: the process group keeps its id until the last member exits.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
