"""The `mechctl serve` command: listens, starts the engine, shows progress, and shuts down cleanly."""

from __future__ import annotations

import asyncio
import errno
import gc
import shlex
import socket
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
from proxy.admin.reload import reload_on_signal
from proxy.engines.command import check_memory, engine_command, slow_format
from proxy.engines.loop import make_engine
from proxy.engines.model_folder import find_model
from proxy.gateway import Apps, make_app
from proxy.http.server import Runner, Site
from proxy.http.tls import Listener, TlsListeners, make_tls_listeners
from proxy.observe.logs import make_logger
from proxy.observe.supervisor import end, first_of
from proxy.process.open_file_limit import raise_limit
from proxy.process.signals import Signals, end_threads, end_within
from proxy.tenants.access import check_exposure

_READY: Final = 2
_FAILED_EXIT_S: Final = 5.0
POOL_THREADS: Final = 8
"""Most threads for work that would block the event loop: file access and compiling policies."""
POOL_NAME: Final = "pool"
"""Prefix of their names."""
_LISTENERS: Final[tuple[Listener, Listener]] = ("public", "admin")


def serve(settings: Settings) -> None:
    """Run until SIGINT or SIGTERM. Raises `InterpretOpsError` with one line when it cannot start."""
    raise_limit()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix=POOL_NAME)
    with asyncio.Runner(loop_factory=lambda: new_loop(pool)) as runner:
        try:
            runner.run(_Serve(settings, console).run())
        except BaseException:
            # The error will be shown; a thread that hangs must not keep the process alive after it.
            end_within(_FAILED_EXIT_S, 1)
            raise
        # Idle threads end at once; those still there afterwards hang.
        pool.shutdown(wait=False)
        end_threads(POOL_NAME)


def new_loop(pool: ThreadPoolExecutor | None = None) -> asyncio.AbstractEventLoop:
    """A uvloop event loop, with a thread pool of fixed size and name."""
    loop = uvloop.new_event_loop()
    loop.set_default_executor(pool or ThreadPoolExecutor(POOL_THREADS, thread_name_prefix=POOL_NAME))
    return loop


class _Serve:
    def __init__(self, settings: Settings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._signals = Signals(settings.gateway.shutdown_grace_s)
        self._stop = self._signals.stop
        self._tls_listeners = TlsListeners()
        self._steps = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._step = self._steps.add_task("Starting", total=None)

    async def run(self) -> None:
        self._signals.install()
        gateway = self._settings.gateway
        with (
            _listen(gateway.host, gateway.port, "gateway.port", "--port") as public,
            _listen(gateway.admin_host, gateway.admin_port, "gateway.admin_port", "--admin-port") as admin,
        ):
            self._check_listeners(public, admin)
            if self._console.is_terminal:
                self._steps.start()
            try:
                await self._run_on(public, admin)
            finally:
                self._end_steps()

    def _check_listeners(self, public: socket.socket, admin: socket.socket) -> None:
        """Before anything slow: refuse open listeners without keys, and load the certificates."""
        keys = self._settings.paths.keys is not None
        gateway = self._settings.gateway
        check_exposure(public.getsockname()[0], "gateway.host", keys=keys)
        check_exposure(admin.getsockname()[0], "gateway.admin_host", keys=keys)
        self._tls_listeners = make_tls_listeners(gateway)

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
            settings,
            lambda url: make_engine(settings, url, model),
            make_logger(),
            self._progress,
            self._tls_listeners,
        )
        grace_s = settings.gateway.shutdown_grace_s
        runners = [
            # Clients that disconnect cancel their request; admins that disconnect must not cancel a reload.
            Runner(
                app,
                apps.gateway.metrics,
                apps.gateway.log,
                handler_cancellation=cancels,
                shutdown_timeout=grace_s,
                access_log=None,
            )
            for app, cancels in ((apps.public, True), (apps.admin, False))
        ]
        gateway = apps.gateway
        kept = [
            gateway.supervisor.keep(
                "stalls", lambda alive: gateway.stall_guard.run(lambda: _connections(runners), alive)
            ),
            gateway.supervisor.keep(
                "reloads", lambda alive: reload_on_signal(self._signals.reload, gateway, alive)
            ),
        ]
        try:
            for runner, listener, name in zip(runners, (public, admin), _LISTENERS, strict=True):
                await runner.setup()
                tls = self._tls_listeners.context(name)
                await Site(runner, listener, tls, settings.gateway.body_timeout_s).start()
            await self._until_stopped(apps, public, admin)
        finally:
            # Requests may finish within the grace period; the stall guard keeps running meanwhile.
            for runner in runners:
                await runner.cleanup()
            await end(*kept)

    async def _until_stopped(self, apps: Apps, public: socket.socket, admin: socket.socket) -> None:
        loop = apps.engine_loop
        assert loop.task is not None
        ended = partial(_end_of, loop.task)
        which, _ = await first_of(self._stopped(), ended(), _wait_for(loop.first_ready))
        self._end_steps()
        if which == _READY:
            # Objects created so far live until exit: exclude them from garbage collection.
            gc.collect()
            gc.freeze()
            self._report_status(apps, admin)
            which, _ = await first_of(self._stopped(), ended(), _wait_for(apps.gateway.readiness.ready))
            if which == _READY:
                self._announce(apps, public)
                await first_of(self._stopped(), ended())
        if not self._stop.is_set():
            await loop.task
        self._console.print("Stopping")

    async def _unless_stopped(self, finding: Coroutine[Any, Any, Path]) -> Path | None:
        _, found = await first_of(finding, self._stopped())
        return found

    async def _stopped(self) -> None:
        await self._stop.wait()

    def _report_status(self, apps: Apps, admin: socket.socket) -> None:
        """Print what is served, policies that need attention, and why the gateway is not ready, if so."""
        entries = apps.gateway.catalogue.entries
        for policy, entry in sorted(entries.items()):
            if entry.unproven:
                self._warn(f"policy {policy} serves without a passing Risk Card: {entry.unproven}")
            if entry.error:
                self._warn(f"policy {policy} is not up to date: {entry.error}")
        policies = ", ".join(_active(apps)) or "none"
        url = self._url(admin, "admin")
        self._console.print(
            f"model {self._served(apps)}, policies {policies}, admin and metrics on {url}", markup=False
        )
        readiness = apps.gateway.readiness
        readiness.log_changes()
        for reason in readiness.reasons():
            self._warn(f"not ready ({reason.code}): {reason.detail}")

    def _announce(self, apps: Apps, public: socket.socket) -> None:
        served, active = self._served(apps), _active(apps)
        name = f"{served}+{active[0]}" if active else served
        body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        route = f"{self._url(public, 'public')}/v1/chat/completions"
        curl = f"curl {route} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
        # On standard output, so that scripts can wait for it.
        sys.stdout.write(f"ready: {self._url(public, 'public')}/v1   try: {curl}\n")
        sys.stdout.flush()

    def _served(self, apps: Apps) -> str:
        engine = apps.gateway.fleet.current
        return self._settings.model.served_name if engine is None else min(engine.served)

    def _warn(self, line: str) -> None:
        self._console.print(line, style="yellow", markup=False)

    def _url(self, listener: socket.socket, name: Listener) -> str:
        host, port = listener.getsockname()[:2]
        scheme = "http" if self._tls_listeners.context(name) is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def _end_steps(self) -> None:
        if self._steps.live.is_started:
            self._steps.stop()

    def _progress(self, line: str) -> None:
        self._steps.update(self._step, description=escape(line))
        if not self._console.is_terminal:
            self._console.print(line, markup=False)


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


async def _end_of(task: asyncio.Task[None]) -> None:
    """Wait until a task has ended, in whatever way. Does not cancel it when cancelled itself."""
    await asyncio.wait({task})


def _active(apps: Apps) -> list[str]:
    """Policies with an active revision."""
    entries = apps.gateway.catalogue.entries
    return [policy for policy in sorted(entries) if entries[policy].active is not None]


def _connections(runners: list[Runner]) -> list[web.RequestHandler]:
    servers = [runner.server for runner in runners if runner.server is not None]
    return [connection for server in servers for connection in server.connections]


def _listen(host: str, port: int, field: str, flag: str) -> socket.socket:
    """A listening socket, opened before anything slow."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(
            f"{field.replace('port', 'host')} = {host!r}, but this machine has no such address ({error})"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            why = f"another program uses it; stop that program, or choose another port with {flag}"
        else:
            why = f"it cannot be opened ({error.strerror})"
        raise ConfigError(f"{field} = {port}, but {why}") from error
    return listener
