"""A gateway in its own process, its engine, and the folders that faults will break."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from faults.marker import POLICY, write_marker_policy

PROGRAM = Path(__file__).with_name("gateway_program.py")
FAKETIME = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / "faketime" / "libfaketime.so.1"
DISK_BYTES = 8 * 2**20

CONFIG = f"""
bindings: [{{policy: {POLICY}, mode: mandatory}}]
tenants: [{{id: anonymous, limits: {{token_budget: 1000000000}}}}]
audit: {{path: disk/audit.jsonl}}
paths: {{policies: policies, artifacts: policies, state: disk/state}}
engine: {{kv_cache_gib: 1, max_num_seqs: 16, max_model_len: 512, silence_timeout_s: 60}}
gateway: {{port: 0, admin_port: 0, request_timeout_s: 40, stream_idle_timeout_s: 20, body_timeout_s: 5}}
"""


@dataclass
class Stand:
    """Everything that a fault can act on."""

    gateway_pid: int
    url: str
    admin: str
    folder: Path
    model: str
    engine_socket: str | None
    """Set for a shared engine, which must not be killed."""
    engine_pid: int | None
    disk_is_mount: bool
    session: aiohttp.ClientSession = field(repr=False)

    @property
    def policies(self) -> Path:
        return self.folder / "policies"

    @property
    def disk(self) -> Path:
        """Folder of audit log and budgets: a disk of a few megabytes."""
        return self.folder / "disk"

    @property
    def gateway(self) -> psutil.Process:
        return psutil.Process(self.gateway_pid)

    def engine(self, part: str) -> psutil.Process:
        """The API server, or the engine core with the worker."""
        if self.engine_pid is not None:
            server = psutil.Process(self.engine_pid)
        else:
            (keeper,) = self.gateway.children()
            (server,) = keeper.children()
        if part == "server":
            return server
        return next(p for p in server.children() if "EngineCore" in " ".join(p.cmdline()))

    @asynccontextmanager
    async def engine_session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """The engine's own socket."""
        socket = self.engine_socket
        if socket is None:
            (keeper,) = self.gateway.children()
            folder = next(part for part in keeper.cmdline() if Path(part).name.startswith("iops-"))
            socket = f"{folder}/engine.sock"
        async with aiohttp.ClientSession("http://engine", connector=aiohttp.UnixConnector(socket)) as session:
            yield session

    async def ready(self) -> bool:
        async with self.session.get(f"{self.url}/readyz") as answer:
            return answer.status == 200

    async def policy_error(self) -> str | None:
        async with self.session.get(f"{self.admin}/admin/policies") as answer:
            listed = (await answer.json())["policies"]
        return next((entry["error"] for entry in listed if entry["id"] == POLICY), "unknown")

    async def metric(self, name: str) -> float:
        async with self.session.get(f"{self.admin}/metrics") as answer:
            text = await answer.text()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    async def until(self, condition: Callable[[], Awaitable[Any]], what: str, timeout_s: float = 30) -> None:
        end = time.monotonic() + timeout_s
        while not await condition():
            if time.monotonic() > end:
                raise TimeoutError(f"not within {timeout_s:g} s: {what}")
            await asyncio.sleep(0.1)

    def state(self) -> dict[str, Any]:
        """The gateway's tasks and threads (`gateway_program.state`)."""
        file = self.folder / "state"
        file.unlink(missing_ok=True)
        os.kill(self.gateway_pid, signal.SIGUSR1)
        end = time.monotonic() + 10
        while not file.exists():
            assert time.monotonic() < end, "the gateway does not tell its state"
            time.sleep(0.02)
        reported: dict[str, Any] = json.loads(file.read_bytes())
        return reported

    def set_clock(self, shift: str) -> None:
        """Make the gateway's clock jump; its monotonic clock continues, as when the system time is set."""
        partial = self.folder / "clock.partial"
        partial.write_text(shift)
        partial.replace(self.folder / "clock")

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Make all writes beneath `disk` fail."""
        if self.disk_is_mount:
            filler = self.disk / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * 4096)
            try:
                yield
            finally:
                filler.unlink()
        else:
            # Without permission to mount: limit the gateway's file size instead.
            limit = psutil.RLIMIT_FSIZE
            before = self.gateway.rlimit(limit)
            self.gateway.rlimit(limit, (1, before[1]))
            try:
                yield
            finally:
                self.gateway.rlimit(limit, before)


@asynccontextmanager
async def make_stand(
    folder: Path, model: Path, *, engine_socket: str | None = None, engine_pid: int | None = None
) -> AsyncIterator[Stand]:
    """Start everything, with a new engine unless one is given; stop it at the end."""
    disk_is_mount = _lay_out(folder, model)
    command = [sys.executable, str(PROGRAM), "serve", "--config", str(folder / "config.yaml")]
    if engine_socket is not None:
        command += ["--engine-url", f"unix://{engine_socket}"]
    log = (folder / "gateway.log").open("w+")
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=log, env=_environment(folder)
        )
        assert process.stdout is not None
        try:
            line = (await process.stdout.readline()).decode()
            log.seek(0)
            reported = re.search(r"model (\S+), .* admin and metrics on (\S+)", text := log.read())
            if reported is None or not line.startswith("ready: "):
                raise RuntimeError(f"the gateway did not start: {text[-2000:]}")
            async with _session() as session:
                url = line.split()[1].removesuffix("/v1")
                yield Stand(
                    process.pid,
                    url,
                    reported[2],
                    folder,
                    reported[1],
                    engine_socket,
                    engine_pid,
                    disk_is_mount,
                    session,
                )
        finally:
            if process.returncode is None:
                process.terminate()
                await asyncio.wait_for(process.wait(), 60)
    finally:
        log.close()
        if disk_is_mount:
            _unmount(folder / "disk")


def _lay_out(folder: Path, model: Path) -> bool:
    """Write the gateway's files; returns whether the audit folder is a disk of its own."""
    for name in ("policies", "disk"):
        (folder / name).mkdir()
    write_marker_policy(folder / "policies", model)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "clock").write_text("+0")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder / "disk")]
    return subprocess.run(mount, capture_output=True).returncode == 0


def _unmount(disk: Path) -> None:
    """Unmount the disk, and keep its content."""
    kept = disk.with_name("kept")
    shutil.copytree(disk, kept)
    subprocess.run(["umount", str(disk)], check=True)
    shutil.copytree(kept, disk, dirs_exist_ok=True)


def _environment(folder: Path) -> dict[str, str]:
    environment = {**os.environ, "COLUMNS": "200", "FAULTS_STATE": str(folder / "state")}
    if FAKETIME.exists():
        environment |= {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(folder / "clock"),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
    return environment


def _session() -> aiohttp.ClientSession:
    """A session whose connections close after each request, so that none counts as leaked."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True), timeout=aiohttp.ClientTimeout(total=60)
    )
