"""Keeps requests and answers of tenants that ask for it: redacted, sealed, and deleted in time."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from interpretops.records.redaction import Redactor
from interpretops.records.transcript_file import Vault, append, delete_old
from interpretops.settings import Settings
from proxy.observe.metrics import Metrics
from proxy.observe.request_context import Trail, Transcript
from proxy.openai_api.answer_text import texts_said
from proxy.openai_api.routes import ROUTES

_MOST_WAITING_BYTES: Final = 16 * 1024 * 1024
"""Of requests and answers that wait to be written: minutes of ordinary traffic, and a bound to memory."""
_MOST_CHARACTERS: Final = 256 * 1024
"""A longer request is not kept, and counted as lost: redacting it would take the core for seconds."""
_SWEEP_EVERY_S: Final = 3600.0
_TOKENS: Final = "[TOKENS]"
"""Stands for a prompt of token numbers: nothing here reads them, so nothing could be taken out of them."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A request that has ended and is to be stored."""

    tenant: str
    transcript: Transcript
    facts: dict[str, Any]

    @property
    def size(self) -> int:
        return self.transcript.size + sum(map(len, self.transcript.chunks))


class Transcripts:
    """One writer, in a thread, so that no request waits for it."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        log: FilteringBoundLogger,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Raises `ConfigError` when a key is missing, or what redacts."""
        self._folder = settings.transcripts_dir.expanduser()
        self._vaults = {
            tenant.id: Vault(tenant.id, tenant.transcripts.key)
            for tenant in settings.tenants
            if tenant.transcripts is not None
        }
        compliance = settings.compliance
        redacts = bool(self._vaults) and compliance.pii_redaction
        self._redactor = Redactor(compliance.phone_regions) if redacts else None
        self._retention_days = compliance.retention_days
        self._metrics = metrics
        self._log = log
        self._now = now
        self._waiting: deque[_Kept] = deque()
        self._waiting_bytes = 0
        self._more = asyncio.Event()
        self._writing: tuple[_Kept, asyncio.Future[None]] | None = None
        """What is being written, also after whoever waits for it was cancelled."""
        for tenant in self._vaults:
            for result in ("stored", "lost"):
                metrics.transcripts.labels(tenant, result)
        if self._vaults:
            routes = [path for path, route in ROUTES.items() if route.generates]
            log.info("requests_are_kept", tenants=sorted(self._vaults), routes=routes)

    def begin(self, tenant: str, route: str, body: Mapping[str, Any], size: int) -> Transcript | None:
        """What fills up while a request of a tenant runs that wants it kept; None for all others.

        ``size`` is that of the body as it came, in bytes.
        """
        return Transcript(route, dict(body), size) if tenant in self._vaults else None

    def keep(self, trail: Trail, status: int) -> None:
        """Store a request that has ended, soon; when too much waits, it is lost: told and counted."""
        assert trail.transcript is not None
        facts: dict[str, Any] = {
            "time": self._now().isoformat(timespec="milliseconds"),
            "request_id": trail.request_id,
            "key": trail.key,
            "model": trail.model,
            "policy": trail.policy,
            "revision": trail.revision,
            "status": status,
            "reason": trail.reason,
            "stream": trail.stream,
        }
        kept = _Kept(trail.tenant, trail.transcript, facts)
        if kept.transcript.too_long:
            self._lose(kept, "too_long")
            return
        if self._waiting and self._waiting_bytes + kept.size > _MOST_WAITING_BYTES:
            self._lose(kept, "too_much_waits")
            return
        self._waiting.append(kept)
        self._waiting_bytes += kept.size
        self._more.set()

    async def run(self, alive: Callable[[], None]) -> None:
        """Write, until cancelled."""
        while True:
            while self._waiting or self._writing:
                await self._store_next()
                alive()
            self._more.clear()
            await self._more.wait()

    async def close(self) -> None:
        """Write what still waits."""
        while self._waiting or self._writing:
            await self._store_next()

    async def sweep(self, alive: Callable[[], None]) -> None:
        """Delete what is too old, until cancelled; also of tenants that ask for it no more."""
        while True:
            try:
                deleted = await asyncio.to_thread(
                    delete_old, self._folder, self._retention_days, self._now().date()
                )
            except OSError as error:
                self._log.error("transcripts_not_deleted", error=error.strerror)
                self._metrics.transcripts_overdue.set(1)
            else:
                self._metrics.transcripts_overdue.set(0)
                if deleted:
                    self._log.info("transcripts_deleted", files=deleted)
            alive()
            await asyncio.sleep(_SWEEP_EVERY_S)

    async def _store_next(self) -> None:
        if self._writing is None:
            kept = self._waiting.popleft()
            self._waiting_bytes -= kept.size
            loop = asyncio.get_running_loop()
            try:
                self._writing = kept, loop.run_in_executor(None, self._write, kept)
            except RuntimeError as error:
                # No thread can be had.
                self._lose(kept, type(error).__name__)
                return
        kept, written = self._writing
        try:
            await asyncio.shield(written)
        except Exception as error:
            # Those behind it must not be lost too. Its text may quote what it was about.
            self._lose(kept, type(error).__name__)
        else:
            self._metrics.transcripts.labels(kept.tenant, "stored").inc()
        self._writing = None

    def _write(self, kept: _Kept) -> None:
        tenant, transcript, facts = kept.tenant, kept.transcript, kept.facts
        said = texts_said(b"".join(transcript.chunks), streamed=bool(facts["stream"]))
        content: dict[str, Any] = {"request": dict(transcript.body), "answer": said}
        if len(json.dumps(content)) > _MOST_CHARACTERS:
            raise ValueError("too long to be redacted in passing")
        if self._redactor is not None:
            if "prompt" in transcript.body:
                content["request"]["prompt"] = _without_tokens(transcript.body["prompt"])
            content = self._redactor.value(content)
        record = {**facts, "route": transcript.route, "redacted": self._redactor is not None, **content}
        line = self._vaults[tenant].seal(str(facts["request_id"]), record)
        append(self._folder, tenant, self._now().date(), line)

    def _lose(self, kept: _Kept, kind: str) -> None:
        self._log.error("transcript_lost", tenant=kept.tenant, request_id=kept.facts["request_id"], kind=kind)
        self._metrics.transcripts.labels(kept.tenant, "lost").inc()


def _without_tokens(prompt: Any) -> Any:
    if not isinstance(prompt, list):
        return prompt
    return _TOKENS if any(isinstance(part, int) for part in prompt) else [*map(_without_tokens, prompt)]
