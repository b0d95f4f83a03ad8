"""The contract between gateway and engine: spelled once, and by nobody else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from interpretops import engine_api
from interpretops.engine_api import (
    EngineCode,
    EngineMessage,
    EngineRefusal,
    LoadedPlan,
    RankDigest,
    Receipt,
    SelfTest,
    names,
    read_loaded,
    read_rank_loaded,
)
from interpretops.errors import EngineError, NoRoomError, PlanError

ROOT = Path(__file__).resolve().parents[2]
DECLARED_IN = ROOT / "interpretops" / "engine_api"
ERRORS = ROOT / "interpretops" / "errors.py"
"""Declares the codes of the errors that the contract passes on: `EngineCode` takes them from there."""
OWN_WORDS = frozenset({names.PASS_THROUGH, names.PREFIX.split("/")[1]})
"""`none` is a word of many; `interpretops` is our name."""


def sources() -> Iterator[Path]:
    """Everything that is run: the packages, the benchmarks, and the fakes; tests may pin what is sent."""
    packages = ("interpretops", "proxy", "discovery", "steering_kernels", "mechctl")
    for folder in (*packages, "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if DECLARED_IN not in path.parents and not path.name.startswith("test_"):
                yield path


def words() -> set[str]:
    """Headers, routes, arguments, codes and the type of a refusal, as they are sent."""
    told = [value for name, value in vars(names).items() if name.isupper()]
    texts = {value.decode() if isinstance(value, bytes) else value for value in told}
    return {text.strip(": ") for text in texts} - OWN_WORDS | {*EngineCode, engine_api.REFUSAL_TYPE}


def messages() -> list[type[EngineMessage]]:
    """Every message with at least two fields that must be there: less is too common to tell."""
    kinds = [kind for kind in vars(engine_api).values() if isinstance(kind, type)]
    found = [kind for kind in kinds if issubclass(kind, EngineMessage)]
    return [kind for kind in found if len(required(kind)) > 1]


def required(kind: type[EngineMessage]) -> frozenset[str]:
    """The fields without which it is malformed."""
    return frozenset(name for name, field in kind.model_fields.items() if field.is_required())


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every literal that is no docstring."""
    documented = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in documented:
            if isinstance(node.value, bytes):
                yield node.lineno, node.value.decode("latin-1")
            elif isinstance(node.value, str):
                yield node.lineno, node.value


def test_no_word_of_the_contract_is_spelled_anywhere_else() -> None:
    """A header, route, argument or code that is written a second time can drift from the first."""
    wanted = words()
    assert {
        "x-interpretops-nonce",
        "interpretops_revision",
        "/interpretops/v1",
        "revision_not_resident",
    } <= wanted
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in sources()
        for line, text in texts(ast.parse(path.read_text(encoding="utf-8")))
        for word in wanted
        if re.search(rf"(?<![\w-]){re.escape(word)}(?!\w)", text.lower())
        and not (path == ERRORS and word in {PlanError.code, NoRoomError.code})
    ]
    assert found == []


def test_no_message_of_the_contract_is_built_by_hand() -> None:
    """A dict with the fields of a message, and no others, is that message without its checks."""
    kinds = messages()
    assert {Receipt, LoadedPlan, RankDigest} <= set(kinds)
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                found += [
                    f"{path.relative_to(ROOT)}:{node.lineno}: {kind.__name__}"
                    for kind in kinds
                    if required(kind) <= keys <= kind.model_fields.keys()
                ]
    assert found == []


def test_wire_stays_as_it_is() -> None:
    """Gateways and engines are upgraded one by one: what one release sends, the next must read."""
    assert names.seal("a" * 64, "b" * 32) == {
        "interpretops_revision": "a" * 64,
        "interpretops_nonce": "b" * 32,
    }
    assert names.plan_path("a" * 64) == "/interpretops/v1/plans/" + "a" * 64
    assert names.receipt_path("b" * 32) == "/interpretops/v1/receipts/" + "b" * 32
    assert (names.ATTEST_ROUTE, names.SELF_TEST_ROUTE) == (
        "/interpretops/v1/attest",
        "/interpretops/v1/selftest",
    )
    receipt = Receipt(revision="none", requests=1, tokens_evaluated=2, finished=True)
    told = (
        '{"revision":"none","requests":1,"tokens_evaluated":2,"edits_applied":0,"gates_fired":0,'
        '"cached_tokens":0,"refusals":0,"finished":true}'
    )
    assert receipt.line() == told
    assert Receipt.read(told.replace('"refusals":0,', "")) == receipt
    assert names.receipt_event(told) == b": interpretops-receipt " + told.encode() + b"\n\n"
    assert EngineRefusal.of(EngineCode.TABLE_FULL, "no room").body() == {
        "error": {"message": "no room", "type": "interpretops_refusal", "param": None, "code": "table_full"}
    }
    assert SelfTest.parse({"ok": True}) == SelfTest(ok=True)


def test_answer_to_a_plan_is_either_what_is_held_or_a_refusal() -> None:
    """Neither is mistaken for the other, and anything else is malformed."""
    rank = {"rank": 0, "digest": "d"}
    held = read_loaded({"revision": "r", "ranks": [rank]})
    assert held == LoadedPlan(revision="r", ranks=[RankDigest(rank=0, digest="d")])
    refusal = EngineRefusal.of(EngineCode.INVALID_PLAN, "damaged")
    assert read_loaded(refusal.body()) == refusal == read_rank_loaded(refusal.body())
    assert read_rank_loaded(rank) == RankDigest(rank=0, digest="d")
    for wrong in ({}, {"revision": "r"}, {"error": "full"}):
        with pytest.raises(ValidationError):
            read_loaded(wrong)


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ({"message": "m", "code": "table_full"}, EngineCode.TABLE_FULL),
        ({"message": "m", "code": "of_tomorrow"}, EngineCode.FAILED),
        ({"message": "Not Found", "type": "NotFoundError", "param": None, "code": 404}, EngineCode.FAILED),
    ],
)
def test_refusal_is_acted_on_by_its_code(told: dict[str, object], code: EngineCode) -> None:
    """Codes of a newer plugin and the server's own numbers are read, and mean no more than a failure."""
    assert EngineRefusal.parse({"error": told}).code is code


def test_malformed_message_names_the_field() -> None:
    """Whoever reads the gateway's log sees what the engine got wrong."""
    with pytest.raises(EngineError, match=r"engine's Receipt is malformed: tokens_evaluated: "):
        Receipt.read('{"revision": "none", "requests": 1, "tokens_evaluated": -1, "finished": true}')
