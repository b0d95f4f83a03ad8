"""Relays whole server-sent events. Recognises the end marker, the receipt and errors; the rest is bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from interpretops.engine_api import RECEIPT_COMMENT

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024

_ERROR_PREFIXES = (
    *(b'data: {"error"', b'data: {"object":"error"', b"event: error", b"event: response.failed"),
)


class SseOverflowError(Exception):
    """An event is larger than any that an engine sends."""


class SseSplitter:
    """Splits a byte stream into events, holds back end marker and receipt, and notes an error event.

    The engine sends its end marker even after an error event, so both must be tracked. The receipt is last.
    """

    def __init__(self, end: bytes) -> None:
        """``end``: start of the event that ends a complete stream."""
        self._end = end
        self._mark = end.strip()
        self._rest = b""
        self.end_event = b""
        """The event that ends the stream, held back; empty until it arrives."""
        self.receipt = b""
        """The engine's receipt; empty until it arrives."""
        self.failed = False
        self.events = 0
        """Number of events passed on."""
        self._last = b""

    @property
    def last_event(self) -> bytes:
        """The last event passed on; empty before the first."""
        return self._last[:-2].rpartition(b"\n\n")[2]

    def feed(self, chunk: bytes) -> bytes:
        """The complete events that can be passed on now, bytes unchanged; possibly none."""
        data = self._rest + chunk
        cut = data.rfind(b"\n\n") + 2
        if cut == 1:
            if len(data) > MAX_EVENT_BYTES:
                raise SseOverflowError
            self._rest = data
            return b""
        if data[cut - 3 : cut - 2] == b"\n":
            # In a run of newlines each pair ends an event; an odd one belongs to the next event.
            cut -= (cut - len(data[:cut].rstrip(b"\n"))) % 2
        self._rest = data[cut:]
        events = data[:cut]
        if (
            self._mark not in events
            and b"error" not in events
            and b"failed" not in events
            and RECEIPT_COMMENT not in events
        ):
            return self._count(events)
        return self._count(self._inspect(events))

    def _count(self, events: bytes) -> bytes:
        if events:
            self.events += events.count(b"\n\n")
            self._last = events
        return events

    def _inspect(self, events: bytes) -> bytes:
        kept: list[bytes] = []
        for raw in events.split(b"\n\n")[:-1]:
            event = raw.lstrip(b"\n")
            if event.startswith(self._end):
                self.end_event = event + b"\n\n"
            elif event.startswith(RECEIPT_COMMENT):
                self.receipt = event.removeprefix(RECEIPT_COMMENT)
            else:
                self.failed = self.failed or event.startswith(_ERROR_PREFIXES)
                kept.append(raw + b"\n\n")
        return b"".join(kept)


def data_event(payload: Mapping[str, Any]) -> bytes:
    """A ``data:`` event."""
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


def error_event(payload: Mapping[str, Any], *, named: bool) -> bytes:
    """An error in mid-stream; named if the route's other events are."""
    if not named:
        return data_event(payload)
    return b"event: error\n" + data_event({"type": "error", **payload})


def comment(name: str, payload: Mapping[str, Any]) -> bytes:
    """A comment line. Clients ignore it; auditors read it."""
    return f": {name} ".encode() + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"
