"""Transcripts are stored only for tenants that opt in: redacted, encrypted, and deleted on time."""

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, Start, Until
from typer.testing import CliRunner

from interpretops.errors import ConfigError
from interpretops.records.transcript_file import Vault, append, delete_old, make_key, read
from interpretops.settings import load_settings
from mechctl.main import app
from proxy.observe import transcripts as transcripts_module
from proxy.observe.transcripts import _Kept
from proxy.openai_api.routes import ROUTES

WORDS = ("write to a", "@b.exam", "ple or not")
"""The scripted answer, in three pieces; personal data spans two of them."""
SECRET = "the canary sings at midnight, mail canary@birds.example"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ACME_KEYS", make_key())
    return "env:ACME_KEYS"


@pytest.fixture
async def front(start: Start, tmp_path: Path, key: str) -> Front:
    tenants = [{"id": "anonymous", "transcripts": {"key": key}}]
    folder, audit = tmp_path / "kept", tmp_path / "audit.jsonl"
    state = tmp_path / "state"
    sections = {"paths.transcripts": folder, "paths.state": state, "audit.path": audit}
    return await start("calm", tenants=tenants, **sections)


async def kept(front: Front, until: Until, number: int) -> list[dict[str, Any]]:
    settings = front.apps.gateway.settings

    async def stored() -> bool:
        reported = front.apps.gateway.metrics.render().decode()
        return f'interpretops_transcripts_total{{result="stored",tenant="anonymous"}} {number}.0' in reported

    await until(stored)
    vault = Vault("anonymous", "env:ACME_KEYS")
    return [vault.open(line) for _, line in read(settings.transcripts_dir, "anonymous")]


async def test_request_and_answer_are_stored_redacted_and_encrypted(
    front: Front, engine: FakeEngine, until: Until, tmp_path: Path
) -> None:
    """With the key they read as sent except for personal data; without it nothing can be read."""
    messages = [{"role": "user", "content": SECRET}]
    await front.chat(model="tiny-model+calm", messages=messages)
    await front.chat(messages=messages, stream=True)
    whole, streamed = await kept(front, until, 2)
    assert whole["request"]["messages"][0]["content"] == "the canary sings at midnight, mail [EMAIL]"
    assert whole["answer"] == [*engine.plans] * 2
    assert (whole["policy"], whole["status"], whole["redacted"]) == ("calm", 200, True)
    assert streamed["answer"] == ["[DONE] error" * 4]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("kept" in path.parts for path in files)
    for path in files:
        assert b"canary sings" not in path.read_bytes(), path
    (day,) = (tmp_path / "kept" / "anonymous").iterdir()
    assert (day.stat().st_mode & 0o777, day.parent.stat().st_mode & 0o777) == (0o600, 0o700)


ASKED = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": SECRET}]},
    "/v1/completions": {"prompt": SECRET},
    "/v1/responses": {"instructions": "be kind", "input": SECRET},
    "/v1/messages": {"max_tokens": 9, "messages": [{"role": "user", "content": SECRET}]},
}


def answer_of(path: str) -> Callable[..., Any]:
    """The engine's answer on a route: one body, or events."""
    text = "".join(WORDS)
    output = [{"type": "message", "content": [{"type": "output_text", "text": text}]}]
    at = {"output_index": 0, "content_index": 0}
    whole, pieces, end = {
        "/v1/chat/completions": (
            {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]},
            [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in WORDS],
            [],
        ),
        "/v1/completions": (
            {"choices": [{"index": 0, "text": text}]},
            [{"choices": [{"index": 0, "text": word}]} for word in WORDS],
            [],
        ),
        "/v1/responses": (
            {"instructions": SECRET, "output": output},
            [{"type": "response.output_text.delta", "delta": word, **at} for word in WORDS],
            [{"type": "response.output_text.done", "text": text, **at}],
        ),
        "/v1/messages": (
            {"content": [{"type": "text", "text": text}]},
            [
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
                for word in WORDS
            ],
            [{"type": "content_block_stop", "index": 0}],
        ),
    }[path]
    return lambda body: [*pieces, *end] if body.get("stream") else [whole]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [path for path, route in ROUTES.items() if route.generates])
async def test_every_generating_route_is_stored(
    front: Front, engine: FakeEngine, until: Until, tmp_path: Path, path: str, stream: bool
) -> None:
    """On every route, streamed or not: redacted across stream pieces, encrypted, in the file due for
    deletion."""
    engine.script = answer_of(path)
    asked = {"model": "tiny-model+calm", "stream": stream, **ASKED[path]}
    async with front.public.post(path, json=asked) as answer:
        assert (answer.status, WORDS[0] in await answer.text()) == (200, True)
    (record,) = await kept(front, until, 1)
    assert (record["route"], record["stream"], record["status"]) == (path, stream, 200)
    assert (record["policy"], record["redacted"], record["reason"]) == ("calm", True, None)
    assert record["answer"] == ["write to [EMAIL] or not"]
    assert SECRET.replace("canary@birds.example", "[EMAIL]") in json.dumps(record["request"])
    (file,) = (tmp_path / "kept" / "anonymous").iterdir()
    assert file.name == f"{datetime.now(UTC).date()}.jsonl"
    assert b"canary" not in file.read_bytes()
    assert delete_old(tmp_path / "kept", 14, datetime.now(UTC).date() + timedelta(days=14)) == 1


@pytest.mark.parametrize("path", ASKED)
async def test_truncated_stream_is_stored_up_to_its_end(
    front: Front, engine: FakeEngine, until: Until, path: str
) -> None:
    """If the engine dies midway, what was sent until then is stored, with the reason."""
    engine.trick = "dies"
    async with front.public.post(path, json={"model": "tiny-model", "stream": True, **ASKED[path]}) as answer:
        await answer.text()
    (record,) = await kept(front, until, 1)
    assert (record["reason"], record["answer"]) == ("engine_failed", ["[DONE] error" * 2])


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6], [7]]])
async def test_prompt_token_ids_are_not_stored(front: Front, until: Until, prompt: list[Any]) -> None:
    """Token ids could hide text from redaction, so only the fact that there were some is stored."""
    async with front.public.post("/v1/completions", json={"model": "tiny-model", "prompt": prompt}) as answer:
        assert answer.status == 200
    (record,) = await kept(front, until, 1)
    assert record["request"]["prompt"] == ("[TOKENS]" if prompt == [5, 6] else ["[TOKENS]"] * 2)


async def test_start_logs_which_routes_are_stored(front: Front, engine: FakeEngine, until: Until) -> None:
    """The log names tenants and routes. Routes that run no model are not stored."""
    (said,) = [line for line in front.log if line["event"] == "requests_are_kept"]
    assert (said["tenants"], said["routes"]) == (["anonymous"], [*ASKED])
    for path, body in (("/tokenize", {"prompt": SECRET}), ("/detokenize", {"tokens": [1]})):
        async with front.public.post(path, json={"model": "tiny-model", **body}) as answer:
            assert answer.status == 200
    await front.chat()
    (record,) = await kept(front, until, 1)
    assert record["route"] == "/v1/chat/completions"


async def test_content_appears_nowhere_but_in_transcripts(
    front: Front, engine: FakeEngine, until: Until
) -> None:
    """With transcripts on, log, metrics and error responses still contain no content."""
    messages = [{"role": "user", "content": SECRET}]
    answers = [await front.chat(messages=messages, unknown=SECRET), await front.chat(model=SECRET)]
    engine.trick = "no_receipt"
    answers.append(await front.chat(model="tiny-model+calm", messages=messages))
    (withheld,) = await kept(front, until, 1)
    assert (withheld["reason"], withheld["answer"]) == ("receipt_failed", [])
    reported = json.dumps(front.log) + front.apps.gateway.metrics.render().decode()
    assert "canary sings" not in reported
    assert "canary sings" not in json.dumps([body for _, _, body in answers[::2]])


async def test_nothing_is_stored_without_opt_in(start: Start, tmp_path: Path) -> None:
    """By default nothing is stored, and no folder is created."""
    front = await start("calm", **{"paths.state": tmp_path / "state"})
    await front.chat()
    assert front.apps.gateway.transcripts.begin("anonymous", "/v1/chat/completions", {}, 2) is None
    assert not (tmp_path / "state").exists()


async def test_full_disk_loses_the_record_and_not_the_answer(
    front: Front, until: Until, tmp_path: Path
) -> None:
    """A transcript that cannot be stored is counted; the caller still gets the answer."""
    (tmp_path / "kept").write_text("no folder")
    assert (await front.chat())[0] == 200

    async def lost() -> bool:
        reported = front.apps.gateway.metrics.render().decode()
        return 'interpretops_transcripts_total{result="lost",tenant="anonymous"} 1.0' in reported

    await until(lost)


def test_old_days_are_deleted(tmp_path: Path) -> None:
    """For every tenant, also former ones; nothing is kept beyond the retention time."""
    today = date(2026, 11, 25)
    for age in (0, 13, 14, 40):
        append(tmp_path, "acme", today - timedelta(days=age), b"{}\n")
    append(tmp_path, "gone", today - timedelta(days=14), b"{}\n")
    assert delete_old(tmp_path, 14, today) == 3
    assert sorted(path.name for path in tmp_path.rglob("*.jsonl")) == ["2026-11-12.jsonl", "2026-11-25.jsonl"]


async def test_gateway_deletes_at_its_start(start: Start, tmp_path: Path, until: Until) -> None:
    """Old files are deleted even if no tenant opts in any more."""
    old = (datetime.now(UTC) - timedelta(days=15)).date()
    append(tmp_path / "state" / "transcripts", "acme", old, b"{}\n")
    await start("calm", **{"paths.state": tmp_path / "state"})

    async def gone() -> bool:
        return not list(tmp_path.rglob("*.jsonl"))

    await until(gone)


def test_keys_can_be_rotated_and_separate_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first key encrypts; older ones still decrypt. Another key or tenant, or a changed line, fails."""
    old, new = make_key(), make_key()
    monkeypatch.setenv("OLD", old)
    monkeypatch.setenv("BOTH", f"{new}\n{old}\n")
    monkeypatch.setenv("NEW", new)
    line = Vault("acme", "env:OLD").seal("r1", {"request_id": "r1"})
    assert Vault("acme", "env:BOTH").open(line) == {"request_id": "r1", "tenant": "acme"}
    fresh = Vault("acme", "env:BOTH").seal("r2", {"request_id": "r2"})
    assert Vault("acme", "env:NEW").open(fresh) is not None
    for vault, spoiled in (
        (Vault("acme", "env:NEW"), line),
        (Vault("other", "env:OLD"), line),
        (Vault("acme", "env:OLD"), line[:-9]),
        (Vault("acme", "env:OLD"), line.replace(b"gAAA", b"gAAB")),
    ):
        assert vault.open(spoiled) is None


def test_truncated_line_damages_no_other(tmp_path: Path) -> None:
    """After a truncated record, the next one starts on its own line."""
    append(tmp_path, "acme", date(2026, 11, 25), b'{"id": "ha')
    append(tmp_path, "acme", date(2026, 11, 25), b"{}\n")
    assert [line for _, line in read(tmp_path, "acme")] == [b'{"id": "ha\n', b"{}\n"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"compliance.retention_days": 0}, "retention_days = 0 keeps nothing"),
        (
            {"tenants": [{"id": "acme", "transcripts": {"key": "hunter2"}}]},
            "transcripts.key: must be env:NAME or file:PATH",
        ),
    ],
)
def test_invalid_settings_prevent_start_up(sections: dict[str, Any], message: str) -> None:
    """A retention of 0 days, and a key where a reference belongs."""
    tenants = [{"id": "acme", "transcripts": {"key": "env:ACME_KEYS"}}]
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(overrides={"tenants": tenants, **sections}, environ={})
    assert "hunter2" not in str(caught.value)


def test_missing_or_wrong_key_is_named_without_its_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reference is named with the remedy; the content of the variable or file never is."""
    monkeypatch.setenv("BAD", "hunter2")
    for reference, message in (
        ("env:NONE_HERE", "that variable is not set"),
        (f"file:{tmp_path / 'none'}", "cannot be read"),
        ("env:BAD", "mechctl transcripts key"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            Vault("acme", reference)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("missing", ["cryptography", "phonenumbers", "stdnum"])
async def test_missing_package_prevents_start_up_and_is_named(
    start: Start, key: str, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Without the packages, a gateway with opted-in tenants refuses to start; others start."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"needs? {missing}.*; pip install 'interpretops\[transcripts\]'"):
        await start("calm", tenants=[{"id": "anonymous", "transcripts": {"key": key}}])
    await start("calm")


def test_key_cannot_be_made_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mechctl transcripts key` says in one line what to install."""
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"needs cryptography; pip install 'interpretops\[transcripts\]'"):
        make_key()


def test_command_makes_keys_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mechctl transcripts key` and `read`: by day, by request; a line that cannot be decrypted gives status
    1."""
    runner = CliRunner()
    key = runner.invoke(app, ["transcripts", "key"]).output.strip()
    monkeypatch.setenv("ACME_KEYS", key)
    config = tmp_path / "config.yaml"
    config.write_text(
        "tenants: [{id: acme, transcripts: {key: 'env:ACME_KEYS'}}]\npaths: {transcripts: kept}\n"
    )
    vault, day = Vault("acme", "env:ACME_KEYS"), date(2026, 11, 25)
    for request_id in ("r1", "r2"):
        append(tmp_path / "kept", "acme", day, vault.seal(request_id, {"request_id": request_id}))
    ask = ["transcripts", "read", "--tenant", "acme", "--config", str(config)]
    assert [json.loads(line)["request_id"] for line in runner.invoke(app, ask).output.splitlines()] == [
        "r1",
        "r2",
    ]
    assert runner.invoke(app, [*ask, "--request-id", "r2"]).output.count("request_id") == 1
    assert runner.invoke(app, [*ask, "--day", "2026-11-24"]).output == ""
    append(tmp_path / "kept", "acme", day, b"broken\n")
    assert runner.invoke(app, ask).exit_code == 1


async def test_burst_is_stored(front: Front, until: Until) -> None:
    """Requests that end simultaneously are all stored: the queue is bounded by size, not number."""
    await asyncio.gather(*(front.chat() for _ in range(300)))
    assert len(await kept(front, until, 300)) == 300
    assert not [line for line in front.log if line["event"] == "transcript_lost"]


async def lost(front: Front, until: Until, number: int) -> list[dict[str, str]]:
    """The log lines of lost transcripts, once the metric has counted that many."""

    async def counted() -> bool:
        reported = front.apps.gateway.metrics.render().decode()
        return f'interpretops_transcripts_total{{result="lost",tenant="anonymous"}} {number}.0' in reported

    await until(counted)
    return [line for line in front.log if line["event"] == "transcript_lost"]


async def test_every_lost_transcript_is_logged(
    front: Front, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lost transcript is logged with id and reason, also when the queue is full."""
    monkeypatch.setattr(transcripts_module, "_MAX_WAITING_BYTES", 1000)
    release = threading.Event()
    real = front.apps.gateway.transcripts._write

    def wait(kept: _Kept) -> None:
        assert release.wait(20)
        real(kept)

    monkeypatch.setattr(front.apps.gateway.transcripts, "_write", wait)
    for _ in range(9):
        await front.chat(headers={"X-Request-Id": "mine"})
    count = int(front.apps.gateway.metrics.transcripts.labels("anonymous", "lost")._value.get())
    lines = await lost(front, until, count)
    assert len(lines) == count > 1
    assert {(line["kind"], line["request_id"]) for line in lines} == {("too_much_waits", "mine")}
    release.set()
    assert len(await kept(front, until, 9 - len(lines))) == 9 - len(lines) > 1


async def test_failed_write_loses_no_other_transcript(
    front: Front, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error loses one transcript, which is logged and counted, but not those behind it."""
    real, called = front.apps.gateway.transcripts._write, []

    def fail(kept: _Kept) -> None:
        called.append(kept)
        if len(called) == 1:
            raise KeyError(SECRET)
        real(kept)

    monkeypatch.setattr(front.apps.gateway.transcripts, "_write", fail)
    await front.chat()
    await front.chat()
    assert len(await kept(front, until, 1)) == 1
    (line,) = await lost(front, until, 1)
    assert line["kind"] == "KeyError"
    assert SECRET not in str(front.log)


async def test_stop_during_a_write_loses_nothing(
    front: Front, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a thread is writing when the gateway stops is written once, and so is the queue behind it."""
    begun, release = threading.Event(), threading.Event()
    transcripts = front.apps.gateway.transcripts
    real = transcripts._write

    def wait(kept: _Kept) -> None:
        begun.set()
        assert release.wait(20)
        real(kept)

    monkeypatch.setattr(transcripts, "_write", wait)
    await front.chat()
    await front.chat()
    assert await asyncio.to_thread(begun.wait, 20)
    stopping = [asyncio.create_task(runner.cleanup()) for runner in front.runners]
    release.set()
    await asyncio.gather(*stopping)
    assert len(await kept(front, until, 2)) == 2


async def test_missing_thread_loses_only_one_transcript(
    front: Front, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started, one transcript is lost, logged and counted, but not those behind it."""
    loop, transcripts = asyncio.get_running_loop(), front.apps.gateway.transcripts
    real, refused = loop.run_in_executor, []

    def refuse(executor: None, work: Callable[..., Any], *arguments: _Kept) -> Any:
        if work == transcripts._write and not refused:
            refused.append(work)
            raise RuntimeError("can't start new thread")
        return real(executor, work, *arguments)

    monkeypatch.setattr(loop, "run_in_executor", refuse)
    await front.chat()
    await front.chat()
    assert len(await kept(front, until, 1)) == 1
    (line,) = await lost(front, until, 1)
    assert line["kind"] == "RuntimeError"
