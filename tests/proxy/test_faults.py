"""The short fault run: what can be broken around an engine that other tests use too."""

import json
import os
from pathlib import Path

import pytest
from faults.answers import judge
from faults.breakages import breakages
from faults.marker import POLICY, WORD
from faults.run import check_audit, run_faults
from faults.stand import FAKETIME, make_stand

LABEL = f"{POLICY}@{'a' * 12}"
RECEIPT = json.dumps({"policy": POLICY, "revision": "a" * 64, "edits_applied": 1})
CHAT = json.dumps({"choices": [{"message": {"content": WORD * 3}}]})
ERROR = json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": "c"}})
WHOLE = {"Content-Type": "application/json", "X-Steering-Policy": LABEL, "X-Steering-Receipt": RECEIPT}
STREAM = {"Content-Type": "text/event-stream", "X-Steering-Policy": LABEL}


def stream(*events, word=WORD):
    delta = json.dumps({"choices": [{"delta": {"content": word}}]})
    return "".join(f"{event}\n\n" for event in (f"data: {delta}", *events))


@pytest.mark.parametrize(
    ("kind", "status", "headers", "text"),
    [
        ("steered", 200, WHOLE, CHAT),
        ("unsteered", 200, {**WHOLE, "X-Steering-Policy": "none"}, CHAT),
        ("unsteered", 200, {**WHOLE, "X-Steering-Receipt": "null"}, CHAT),
        ("unsteered", 200, {**WHOLE, "X-Steering-Receipt": RECEIPT.replace("aa", "bb")}, CHAT),
        ("unsteered", 200, WHOLE, CHAT.replace(WORD * 3, "Paris")),
        ("unsteered", 200, WHOLE, CHAT.replace(WORD * 3, "")),
        ("steered", 200, STREAM, stream(f": steering-receipt {RECEIPT}", "data: [DONE]")),
        ("unsteered", 200, STREAM, stream("data: [DONE]")),
        ("unsteered", 200, STREAM, stream(f"data: {ERROR}", word="Paris")),
        ("broken_off", 200, STREAM, stream(f"data: {ERROR}")),
        ("misshapen", 200, STREAM, stream()),
        ("refused", 503, {"X-Request-Id": "r"}, ERROR),
        ("misshapen", 500, {"X-Request-Id": "r"}, ERROR),
        ("misshapen", 503, {}, ERROR),
        ("misshapen", 400, {"X-Request-Id": "r"}, "Bad Request"),
    ],
)
def test_answers_are_judged_by_receipt_and_by_words(kind, status, headers, text):
    """Only what is proven and says nothing but the policy's word counts as steered."""
    assert judge(status, headers, text).kind == kind


@pytest.mark.engine
@pytest.mark.timeout(1200)
async def test_faults_end_in_no_unsteered_answer_and_no_leak(engine_server, default_model_dir, tmp_path):
    """Whatever breaks: answers are steered or refused, nothing is left behind, the audit log is whole."""
    faults = [fault for fault in breakages(malformed=90, disconnects=24) if not fault.needs_own_engine]
    assert FAKETIME.exists() or not os.environ.get("CI")
    async with make_stand(
        Path(tmp_path),
        default_model_dir,
        engine_socket=str(engine_server.socket),
        engine_pid=engine_server.process.pid,
    ) as stand:
        outcome = await run_faults(stand, faults, print)
    outcome.wrong += check_audit(stand)
    assert outcome.wrong == []
    assert outcome.leaks == {}
    assert outcome.counts["unsteered"] == 0
    assert outcome.counts["steered"] > 20
    assert outcome.counts["refused"] > 20
