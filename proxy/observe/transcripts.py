"""Stores requests and answers of tenants that opt in: redacted, encrypted, and deleted after a set time."""

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
from proxy.observe.request_context import RequestContext, Transcript
from proxy.openai_api.answer_text import answer_texts
from proxy.openai_api.routes import ROUTES

_MAX_WAITING_BYTES: Final = 16 * 1024 * 1024
"""Bytes of requests and answers waiting to be written: minutes of usual traffic, and a memory bound."""
_MAX_CHARACTERS: Final = 256 * 1024
"""Longer requests are counted as lost: redacting one would occupy a core for seconds."""
_SWEEP_EVERY_S: Final = 3600.0
_TOKENS: Final = "[TOKENS]"
"""Replaces a prompt of token ids: they are not decoded here, so they cannot be redacted."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A finished request to be stored."""

    tenant: str
    transcript: Transcript
    facts: dict[str, Any]

    @property
    def size(self) -> int:
        return self.transcript.size + sum(map(len, self.transcript.chunks))


class Transcripts:
    """Writes in a thread, one transcript at a time, so that no request waits for it."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        log: FilteringBoundLogger,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Raises `ConfigError` when an encryption key or the redaction library is missing."""
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
        """The write in progress. It continues even if the task waiting for it is cancelled."""
        for tenant in self._vaults:
            for result in ("stored", "lost"):
                metrics.transcripts.labels(tenant, result)
        if self._vaults:
            routes = [path for path, route in ROUTES.items() if route.generates]
            log.info("requests_are_kept", tenants=sorted(self._vaults), routes=routes)

    def begin(self, tenant: str, route: str, body: Mapping[str, Any], size: int) -> Transcript | None:
        """Start the transcript of a request; None for tenants that keep none.

        ``size``: of the request body as received, in bytes.
        """
        return Transcript(route, dict(body), size) if tenant in self._vaults else None

    def keep(self, context: RequestContext, status: int) -> None:
        """Queue a finished request for storage. If the queue is full, log and count it as lost."""
        assert context.transcript is not None
        facts: dict[str, Any] = {
            "time": self._now().isoformat(timespec="milliseconds"),
            "request_id": context.request_id,
            "key": context.key,
            "model": context.model,
            "policy": context.policy,
            "revision": context.revision,
            "status": status,
            "reason": context.reason,
            "stream": context.stream,
        }
        kept = _Kept(context.tenant, context.transcript, facts)
        if kept.transcript.too_long:
            self._lose(kept, "too_long")
            return
        if self._waiting and self._waiting_bytes + kept.size > _MAX_WAITING_BYTES:
            self._lose(kept, "too_much_waits")
            return
        self._waiting.append(kept)
        self._waiting_bytes += kept.size
        self._more.set()

    async def run(self, alive: Callable[[], None]) -> None:
        """Write queued transcripts, until cancelled."""
        while True:
            while self._waiting or self._writing:
                await self._store_next()
                alive()
            self._more.clear()
            await self._more.wait()

    async def close(self) -> None:
        """Write the transcripts still queued."""
        while self._waiting or self._writing:
            await self._store_next()

    async def sweep(self, alive: Callable[[], None]) -> None:
        """Delete expired transcripts, until cancelled; also of tenants that no longer opt in."""
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
                # No thread could be started.
                self._lose(kept, type(error).__name__)
                return
        kept, written = self._writing
        try:
            await asyncio.shield(written)
        except Exception as error:
            # Keep going, so that those behind it are not lost. Log only the type: its text may quote them.
            self._lose(kept, type(error).__name__)
        else:
            self._metrics.transcripts.labels(kept.tenant, "stored").inc()
        self._writing = None

    def _write(self, kept: _Kept) -> None:
        tenant, transcript, facts = kept.tenant, kept.transcript, kept.facts
        texts = answer_texts(b"".join(transcript.chunks), streamed=bool(facts["stream"]))
        content: dict[str, Any] = {"request": dict(transcript.body), "answer": texts}
        if len(json.dumps(content)) > _MAX_CHARACTERS:
            raise ValueError("too long to redact")
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
