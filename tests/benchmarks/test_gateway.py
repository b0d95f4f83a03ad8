"""The gateway's benchmark ends with its result, or with a line that says why not."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession

from benchmarks import gateway, record


def test_commit_is_unknown_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unpacked archive, one inside another checkout, and a machine without git measure all the same."""
    assert record.commit() != record.UNKNOWN or not (Path(record.__file__).parents[1] / ".git").exists()
    with monkeypatch.context() as without_git:
        without_git.setenv("PATH", str(tmp_path))
        assert record.commit() == record.UNKNOWN
    (tmp_path / ".git").mkdir()
    for folder in (tmp_path / "archive", tmp_path):
        monkeypatch.setattr(record, "__file__", str(folder / "benchmarks" / "record.py"))
        assert record.commit() == record.UNKNOWN


def test_result_that_cannot_be_kept_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was measured and shown; where it should lie, nothing can be written."""
    (tmp_path / "results").write_text("no folder")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    record.write("gateway", {"n": 1})
    assert "gateway.json: not written" in capsys.readouterr().err


@pytest.fixture
async def silent() -> AsyncIterator[str]:
    """The address of a server that answers nothing."""
    server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def test_rate_that_is_not_carried_is_said(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests pile up no further than a bound, and the line names server and rate."""
    monkeypatch.setattr(gateway, "_MAX_SECONDS_BEHIND", 0.1)
    server = gateway.Server(process=None, url=silent, headers={})  # type: ignore[arg-type]  # is not looked at
    async with ClientSession() as session:
        with pytest.raises(gateway.NotCarriedError, match=rf"in flight at {silent}: .* does not carry 200 a"):
            await gateway.load(session, server, 200, 5, stream=False)
