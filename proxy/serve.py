"""The `mechctl serve` command: listens, starts the engine, shows progress, says ready, ends cleanly."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import shlex
import signal
import socket
import ssl
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvloop
from aiohttp import web
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from interpretops.errors import ConfigError
from interpretops.settings import Settings
from proxy.access import check_exposure
from proxy.engine_command import check_memory, engine_command, slow_format
from proxy.engine_loop import make_engine
from proxy.gateway import Apps, make_app
from proxy.http_server import Runner
from proxy.logs import make_logger
from proxy.model_folder import find_model
from proxy.supervisor import end, first_of
from proxy.tls import make_tls

_FORCED_EXIT = 130
_CAME: Final = 2
POOL_THREADS: Final = 8
"""Most threads for what would hold up the loop: files, and compiling policies."""
POOL_NAME: Final = "pool"
"""How their names begin."""


def serve(settings: Settings) -> None:
    """Run until SIGINT or SIGTERM. Raises `InterpretOpsError`, of one line, when it cannot start."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_Serve(settings, console).run())


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, with a pool of threads of our size and name, whatever machine this is."""
    loop = uvloop.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(POOL_THREADS, thread_name_prefix=POOL_NAME))
    return loop


class _Serve:
    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._stop = asyncio.Event()
        self._tls: list[ssl.SSLContext | None] = [None, None]
        self._steps = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._step = self._steps.add_task("Starting", total=None)

    async def run(self) -> None:
        self._take_signals()
        gateway = self._settings.gateway
        with (
            _listen(gateway.host, gateway.port, "gateway.port", "--port") as public,
            _listen(gateway.admin_host, gateway.admin_port, "gateway.admin_port", "--admin-port") as admin,
        ):
            self._check_doors(public, admin)
            if self._console.is_terminal:
                self._steps.start()
            try:
                await self._run_on(public, admin)
            finally:
                self._end_steps()

    def _check_doors(self, public: socket.socket, admin: socket.socket) -> None:
        """Before anything slow begins: who could come in, and whether certificates can be read."""
        keys = self._settings.paths.keys is not None
        gateway = self._settings.gateway
        check_exposure(public.getsockname()[0], "gateway.host", keys=keys)
        check_exposure(admin.getsockname()[0], "gateway.admin_host", keys=keys)
        self._tls = [
            make_tls(gateway.tls_cert, gateway.tls_key, "gateway.tls_cert"),
            make_tls(gateway.admin_tls_cert, gateway.admin_tls_key, "gateway.admin_tls_cert"),
        ]

    async def _run_on(self, public: socket.socket, admin: socket.socket) -> None:
        settings, model = self._settings, None
        if not settings.engine.url:
            model = await self._unless_stopped(find_model(settings, self._progress))
            if model is None:
                return
            check_memory(settings, model)
            engine_command(settings, model, Path("engine.sock"))
            if slow := slow_format(settings):
                self._console.print(slow, style="yellow", markup=False)
            self._progress("Starting the engine (about a minute on a CPU)")
        else:
            self._progress(f"Waiting for an engine at {', '.join(settings.engine.url)}")
        apps = make_app(
            settings, lambda url: make_engine(settings, url, model), make_logger(), self._progress
        )
        grace_s = settings.gateway.shutdown_grace_s
        runners = [
            # A client that leaves stops its request; an admin who leaves stops no reload half-way.
            Runner(
                app,
                apps.gateway.metrics,
                apps.gateway.log,
                handler_cancellation=leaves,
                shutdown_timeout=grace_s,
                access_log=None,
            )
            for app, leaves in ((apps.public, True), (apps.admin, False))
        ]
        gateway = apps.gateway
        watch = gateway.supervisor.keep(
            "stalls", lambda alive: gateway.stalls.run(lambda: _connections(runners), alive)
        )
        try:
            for runner, listener, tls in zip(runners, (public, admin), self._tls, strict=True):
                await runner.setup()
                await web.SockSite(runner, listener, ssl_context=tls).start()
            await self._until_stopped(apps, public, admin)
        finally:
            # What ends by itself may; what does not move is still cut meanwhile.
            for runner in runners:
                await runner.cleanup()
            await end(watch)

    async def _until_stopped(self, apps: Apps, public: socket.socket, admin: socket.socket) -> None:
        loop = apps.engine_loop
        assert loop.task is not None
        over = partial(_end_of, loop.task)
        which, _ = await first_of(self._stopped(), over(), _comes(loop.first_ready))
        self._end_steps()
        if which == _CAME:
            # What has been made until now stays for good: no need to look at it again and again.
            gc.collect()
            gc.freeze()
            self._tell(apps, admin)
            which, _ = await first_of(self._stopped(), over(), _comes(apps.gateway.readiness.ready))
            if which == _CAME:
                self._announce(apps, public)
                await first_of(self._stopped(), over())
        if not self._stop.is_set():
            await loop.task
        self._console.print("Stopping")

    async def _unless_stopped(self, finding: Coroutine[Any, Any, Path]) -> Path | None:
        _, found = await first_of(finding, self._stopped())
        return found

    async def _stopped(self) -> None:
        await self._stop.wait()

    def _tell(self, apps: Apps, admin: socket.socket) -> None:
        """What serves, what is not as its operator may believe, and what keeps requests from being served."""
        entries = apps.gateway.catalogue.entries
        for policy, entry in sorted(entries.items()):
            if entry.unproven:
                self._warn(f"policy {policy} serves unproven: {entry.unproven}")
            if entry.error:
                self._warn(f"policy {policy} is not up to date: {entry.error}")
        policies = ", ".join(_active(apps)) or "none"
        url = self._url(admin, 1)
        self._console.print(
            f"model {self._served(apps)}, policies {policies}, admin and metrics on {url}", markup=False
        )
        readiness = apps.gateway.readiness
        readiness.look()
        for reason in readiness.reasons():
            self._warn(f"not ready ({reason.code}): {reason.detail}")

    def _announce(self, apps: Apps, public: socket.socket) -> None:
        served, active = self._served(apps), _active(apps)
        name = f"{served}+{active[0]}" if active else served
        body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        route = f"{self._url(public, 0)}/v1/chat/completions"
        curl = f"curl {route} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
        # On standard output, where scripts wait for it.
        sys.stdout.write(f"ready: {self._url(public, 0)}/v1   try: {curl}\n")
        sys.stdout.flush()

    def _served(self, apps: Apps) -> str:
        engine = apps.gateway.fleet.current
        return self._settings.model.served_name if engine is None else min(engine.served)

    def _warn(self, line: str) -> None:
        self._console.print(line, style="yellow", markup=False)

    def _url(self, listener: socket.socket, which: int) -> str:
        host, port = listener.getsockname()[:2]
        scheme = "http" if self._tls[which] is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def _end_steps(self) -> None:
        if self._steps.live.is_started:
            self._steps.stop()

    def _progress(self, line: str) -> None:
        self._steps.update(self._step, description=escape(line))
        if not self._console.is_terminal:
            self._console.print(line, markup=False)

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self._stop.is_set():
            # Asked twice: go at once. The engine's keeper sees us gone and ends the engine.
            os._exit(_FORCED_EXIT)
        self._stop.set()


async def _comes(event: asyncio.Event) -> None:
    await event.wait()


async def _end_of(task: asyncio.Task[None]) -> None:
    """Wait until a task has ended, however it did; leave it alone when cancelled."""
    await asyncio.wait({task})


def _active(apps: Apps) -> list[str]:
    """Policies that serve."""
    entries = apps.gateway.catalogue.entries
    return [policy for policy in sorted(entries) if entries[policy].active is not None]


def _connections(runners: list[Runner]) -> list[web.RequestHandler]:
    servers = [runner.server for runner in runners if runner.server is not None]
    return [connection for server in servers for connection in server.connections]


def _listen(host: str, port: int, field: str, flag: str) -> socket.socket:
    """A listening socket, before anything slow begins."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(
            f"{field.replace('port', 'host')} = {host!r}, but it is no address here ({error})"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            why = f"another program uses it; stop that, or choose another with {flag}"
        else:
            why = f"it cannot be opened ({error.strerror})"
        raise ConfigError(f"{field} = {port}, but {why}") from error
    return listener
