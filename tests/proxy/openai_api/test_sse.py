"""Splitting of event streams."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.openai_api import sse
from proxy.openai_api.routes import ROUTES
from proxy.openai_api.sse import SseOverflowError, SseSplitter

DONE = b"data: [DONE]\n\n"
EVENTS = [b'data: {"text":"[DONE]"}\n\n', b'data: {"text":"\\n\\n error"}\n\n', b": note\n\n", b"data: x\n\n"]


@given(st.lists(st.sampled_from(EVENTS), max_size=8), st.data())
def test_events_survive_any_cut_of_the_bytes(events: list[bytes], data: Any) -> None:
    """However the bytes are split, all events come out complete and in order; only the end marker is held
    back."""
    whole = b"".join(events) + DONE
    splitter, out, at = SseSplitter(b"data: [DONE]"), b"", 0
    while at < len(whole):
        size = data.draw(st.integers(1, len(whole) - at))
        piece = splitter.feed(whole[at : at + size])
        assert piece == b"" or piece.endswith(b"\n\n")
        out, at = out + piece, at + size
    assert out == b"".join(events)
    assert splitter.end_event == DONE
    assert not splitter.failed


@given(st.integers(1, 20))
def test_error_event_is_seen_in_any_cut(size: int) -> None:
    """An error event is passed on and noted."""
    whole = b'data: {"a":1}\n\ndata: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n'
    splitter = SseSplitter(b"data: [DONE]")
    out = b"".join(splitter.feed(whole[at : at + size]) for at in range(0, len(whole), size))
    assert splitter.failed
    assert splitter.end_event == DONE
    assert out == whole.removesuffix(DONE)


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])
def test_only_the_end_event_is_held_back(route: str) -> None:
    """The end event waits for the receipt; its name inside a text has no effect."""
    end = ROUTES[route].end
    text = b"event: x\ndata: " + end.strip() + b"\n\n"
    last = end + b'data: {"all": 1}\n\n'
    splitter = SseSplitter(end)
    assert splitter.feed(text + last) == text
    assert splitter.end_event == last
    failed = SseSplitter(end)
    assert failed.feed(b"event: response.failed\ndata: {}\n\n")
    assert failed.failed


def test_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that never ends an event cannot fill the gateway's memory."""
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 10)
    with pytest.raises(SseOverflowError):
        SseSplitter(b"data: [DONE]").feed(b"data: 0123456789")
