"""The engine's own server: what it admits, loads, attests and self-tests (promises 1, 4, 10)."""

import itertools
import json
import os
import pickle
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm_fork_server import ForkServer

from interpretops.plan import Plan

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SEEDS = itertools.count(1000)
"""A separate plan for every test, so that no test finds another's blocks in the prefix cache."""


@pytest.fixture
def client(engine_server: Any) -> Iterator[httpx.Client]:
    with engine_server.client() as client:
        yield client


def ask(client: httpx.Client, revision: str | None, **body: Any) -> httpx.Response:
    """One short completion under a revision; the returned request's body holds the nonce."""
    args = {"interpretops_nonce": secrets.token_hex(16)}
    if revision is not None:
        args["interpretops_revision"] = revision
    request = {"model": "m", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    return client.post("/v1/completions", json=request | {"vllm_xargs": args} | body)


def put(client: httpx.Client, plan: Plan, data: bytes | None = None) -> httpx.Response:
    return client.put(
        f"/interpretops/v1/plans/{plan.revision}", content=plan.to_bytes() if data is None else data
    )


@pytest.fixture
def resident(client: httpx.Client, make_plan: Callable[..., Plan]) -> Iterator[Plan]:
    """A plan loaded for the duration of a test."""
    plan = make_plan(400.0, seed=next(SEEDS))  # far larger than the stream itself, so every answer changes
    assert put(client, plan).status_code == 200
    yield plan
    client.delete(f"/interpretops/v1/plans/{plan.revision}")


@pytest.mark.parametrize("revision", [None, "", "NONE", "0" * 63, "0" * 64, "f" * 64])
def test_request_without_a_resident_revision_is_refused(client: httpx.Client, revision: str | None) -> None:
    """Missing, malformed and unknown revisions: no token is returned."""
    answer = ask(client, revision)
    assert answer.status_code >= 400
    assert "choices" not in answer.json()


def test_request_without_any_arguments_is_refused(client: httpx.Client) -> None:
    """A client on the engine's own socket that sends no policy arguments gets no answer."""
    answer = client.post("/v1/completions", json={"model": "m", "prompt": "Hi", "max_tokens": 1})
    assert answer.status_code == 400
    assert "every request must name a revision" in answer.json()["error"]["message"]
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=chat).status_code == 400


def test_retired_revision_is_refused_and_its_rows_are_freed(
    client: httpx.Client, make_plan: Callable[..., Plan]
) -> None:
    """After DELETE no request of the revision is served, and its rows are empty."""
    plan = make_plan(60.0, seed=11)
    assert put(client, plan).status_code == 200
    assert ask(client, plan.revision).status_code == 200
    assert client.delete(f"/interpretops/v1/plans/{plan.revision}").json()["in_flight"] == 0
    assert ask(client, plan.revision).status_code >= 400
    attested = client.get("/interpretops/v1/attest").json()["engines"][0]
    assert plan.revision not in attested["resident"]
    assert all(plan.revision not in rank["resident"] for rank in attested["ranks"])


def test_revision_in_use_outlives_its_retirement(client: httpx.Client, resident: Plan) -> None:
    """A started stream ends under its retired revision; then the rows are freed."""
    nonce = secrets.token_hex(16)
    body = {
        "model": "m",
        "prompt": "Once upon a time",
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "vllm_xargs": {"interpretops_revision": resident.revision, "interpretops_nonce": nonce},
    }
    with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        retired = client.delete(f"/interpretops/v1/plans/{resident.revision}").json()
        assert retired["in_flight"] == 1
        assert ask(client, resident.revision).status_code >= 400
        rest = list(lines)
    assert "data: [DONE]" in rest
    receipt = client.get(f"/interpretops/v1/receipts/{nonce}").json()
    assert receipt["revision"] == resident.revision
    assert receipt["edits_applied"] >= 60
    attested = client.get("/interpretops/v1/attest").json()["engines"][0]
    assert resident.revision not in attested["ranks"][0]["resident"]


def test_attested_digest_is_the_plans_own(client: httpx.Client, resident: Plan) -> None:
    """Every rank's digest, read back from its tables, equals the plan's."""
    ranks = client.get("/interpretops/v1/attest").json()["engines"][0]["ranks"]
    assert [rank["resident"][resident.revision] for rank in ranks] == [resident.digest()]


def test_damaged_or_executable_plan_is_refused(client: httpx.Client, make_plan: Callable[..., Plan]) -> None:
    """A flipped byte, a pickle and a plan for another model never become resident."""
    plan = make_plan(60.0, seed=12)
    data = plan.to_bytes()
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    assert put(client, plan, damaged).json()["error"]["code"] == "invalid_plan"
    import hashlib

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os._exit, (1,))

    bomb = pickle.dumps(Bomb())
    answer = client.put(f"/interpretops/v1/plans/{hashlib.sha256(bomb).hexdigest()}", content=bomb)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_plan")
    from dataclasses import replace

    foreign = replace(plan, model=replace(plan.model, fingerprint="0" * 64))
    assert "compile the policy against it" in put(client, foreign).json()["error"]["message"]
    assert client.get("/health").status_code == 200


def test_full_table_refuses_by_name_and_keeps_what_it_has(
    client: httpx.Client, make_plan: Callable[..., Plan]
) -> None:
    """An engine with 8 rows holds 7 revisions; the next is refused, and the resident ones keep serving."""
    plans = [make_plan(10.0, seed=100 + index) for index in range(8)]
    try:
        statuses = [put(client, plan) for plan in plans]
        assert [status.status_code for status in statuses] == [200] * 7 + [507]
        assert statuses[-1].json()["error"]["code"] == "table_full"
        assert ask(client, plans[0].revision).status_code == 200
        assert ask(client, plans[7].revision).status_code >= 400
    finally:
        for plan in plans:
            client.delete(f"/interpretops/v1/plans/{plan.revision}")


def test_blocks_of_one_revision_are_never_reused_under_another(client: httpx.Client, resident: Plan) -> None:
    """For the same long prompt: a cache hit under the same revision and salt, none across revisions or
    salts."""

    def cached(revision: str, salt: str | None = None) -> tuple[str, int]:
        nonce = secrets.token_hex(16)
        body: dict[str, Any] = {
            "model": "m",
            "prompt": "The quick brown fox jumps over the lazy dog. " * 40,
            "max_tokens": 8,
            "temperature": 0,
            "vllm_xargs": {"interpretops_revision": revision, "interpretops_nonce": nonce},
        }
        if salt is not None:
            body["cache_salt"] = salt
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        receipt = client.get(f"/interpretops/v1/receipts/{nonce}").json()
        return answer.json()["choices"][0]["text"], receipt["cached_tokens"]

    steered, first = cached(resident.revision)
    assert first == 0
    plain, crossed = cached("none")
    assert crossed == 0
    assert plain != steered
    assert cached(resident.revision) == (steered, pytest.approx(cached("none")[1]))
    assert cached(resident.revision)[1] > 0
    assert cached(resident.revision, "tenant-a")[1] == 0
    assert cached(resident.revision, "tenant-a")[1] > 0
    # A client's salt cannot equal another revision's.
    assert cached("none", "r" + resident.revision)[1] == 0


def test_self_test_passes_on_a_healthy_engine(client: httpx.Client) -> None:
    """The probe acts through the running model and leaves nothing behind."""
    assert client.post("/interpretops/v1/selftest").json() == {"ok": True, "reason": ""}
    assert client.get("/interpretops/v1/attest").json()["engines"][0]["resident"] == {}


def test_receipt_can_be_fetched_once(client: httpx.Client) -> None:
    """A receipt is gone once it has been fetched."""
    nonce = secrets.token_hex(16)
    args = {"interpretops_revision": "none", "interpretops_nonce": nonce}
    ask(client, None, vllm_xargs=args, n=3, temperature=1.0)
    receipt = client.get(f"/interpretops/v1/receipts/{nonce}")
    assert receipt.json()["requests"] == 3
    assert client.get(f"/interpretops/v1/receipts/{nonce}").status_code == 404


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_receipt_is_sent_with_its_answer(
    client: httpx.Client, resident: Plan, path: str, *, stream: bool
) -> None:
    """A request with the nonce as header gets the receipt with its answer: as a header, or as the last
    event."""
    nonce = secrets.token_hex(16)
    asked = (
        {"prompt": "One two"}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "Hi"}]}
    )
    args = {"interpretops_revision": resident.revision, "interpretops_nonce": nonce}
    body = {"model": "m", "max_tokens": 4, "stream": stream, "vllm_xargs": args, **asked}
    answer = client.post(path, json=body, headers={"X-InterpretOps-Nonce": nonce})
    if stream:
        *_, end, last, rest = answer.text.split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        reported = last.removeprefix(": interpretops-receipt ")
    else:
        reported = answer.headers["X-InterpretOps-Receipt"]
        assert len(answer.json()["choices"]) == 1
    receipt = json.loads(reported)
    assert (receipt["revision"], receipt["requests"], receipt["finished"]) == (resident.revision, 1, True)
    assert receipt["tokens_evaluated"] >= 5
    assert client.get(f"/interpretops/v1/receipts/{nonce}").status_code == 404


def test_failed_request_carries_no_receipt(client: httpx.Client) -> None:
    """Errors carry no receipt, nor do answers of routes that do not generate."""
    headers = {"X-InterpretOps-Nonce": secrets.token_hex(16)}
    for path, body in (("/v1/completions", {"model": "m", "prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        answer = client.post(path, json=body, headers=headers)
        assert "X-InterpretOps-Receipt" not in answer.headers
        assert answer.json()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--speculative-config", '{"method":"ngram","num_speculative_tokens":2}'], "speculative decoding"),
        (["--enable-lora"], "LoRA adapters (use"),
        (["--additional-config", '{"interpretops":{"row":3}}'], "interpretops.row: unknown key"),
    ],
)
def test_engine_that_would_break_the_row_map_does_not_boot(
    default_model_dir: Path, fork_server: ForkServer, tmp_path: Path, flags: list[str], reason: str
) -> None:
    """Unsupported configurations stop the process, with the reason on one line."""
    server = ("-m", "vllm.entrypoints.openai.api_server", "--model", default_model_dir, "--enforce-eager")
    log = tmp_path / "log.txt"
    assert fork_server.run(*server, *flags, log=log, timeout_s=180, VLLM_PLUGINS="interpretops") != 0
    assert reason in log.read_text()
