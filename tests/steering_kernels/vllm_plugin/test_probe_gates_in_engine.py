"""Attention probes in windows and over answers decide in the real engine as in a session (promises 4, 5,
8)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interpretops import HookedModel, SteeringSession
from interpretops.plan import ALWAYS, Gate, ModelSpec, Plan, ProbePart, Site

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT_TOKENS = 125
OUTPUT_TOKENS = 12
LATE = 6
"""The generated token at which the gates over the answer open, by the model's own answer."""


def probe_gate(spec: ModelSpec, cut: float, **options: Any) -> Gate:
    """An attention probe of two heads after layer 3 and two after layer 6.

    It reads -4.4 of the whole prompt, and at most -0.6 of a window of 16 tokens. In windows of 4 tokens of
    the unedited answer it reads -7.6 or less, and -4.7 at token `LATE`.
    """
    rng = np.random.default_rng(8)
    parts = []
    for layer in (3, 6):
        query, read = rng.normal(size=(2, 2, spec.hidden_size)).astype(np.float32)
        query /= np.linalg.norm(query, axis=1, keepdims=True)
        read /= np.linalg.norm(read, axis=1, keepdims=True)
        parts.append(
            ProbePart(Site(layer, "resid_post"), query, read, np.zeros(2, np.float32), max_norm=500.0)
        )
    return Gate(
        parts[-1].site,
        ALWAYS.read,
        ALWAYS.bias,
        np.full(1, cut, np.float32),
        latched=True,
        probe=tuple(parts),
        **options,
    )


def make_prompt() -> list[int]:
    return [1, *np.random.default_rng(0).integers(100, 40000, PROMPT_TOKENS - 1).tolist()]


FIRED = {
    "whole": 0,
    "window": OUTPUT_TOKENS,
    "answer": OUTPUT_TOKENS - 1 - LATE,
    "shut answer": 0,
    "beside": OUTPUT_TOKENS - 1 - LATE,
}
"""Tokens at which each gate is open; a generated token is read when it is fed back."""


@pytest.fixture(scope="module")
def plans(spec: ModelSpec, make_plan: Callable[..., Plan]) -> dict[str, Plan]:
    answer = {"scope": "answer", "window": 4}
    found = {
        "whole": make_plan(80.0, gate=probe_gate(spec, -2.5, scope="prompt")),
        "window": make_plan(80.0, gate=probe_gate(spec, -2.5, scope="prompt", window=16)),
        "answer": make_plan(80.0, gate=probe_gate(spec, -6.0, **answer)),
        "shut answer": make_plan(80.0, gate=probe_gate(spec, 200.0, **answer)),
    }
    beside = probe_gate(spec, -6.0 - 2 * 4.36, beside=2, prompt_weight=2.0, **answer)
    closed = probe_gate(spec, 200.0, scope="prompt")
    return found | {"beside": replace(found["answer"], gates=(ALWAYS, beside, closed))}


@pytest.fixture(scope="module")
def runs(plans: dict[str, Plan], run_engine: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """The same requests twice and a second turn, in one batch, on an engine without cache, one that takes
    cached prompts in chunks, and one short of memory."""
    work = [("none", "none"), *((name, plan.revision) for name, plan in plans.items())]
    batch = [{"prompt": make_prompt(), "revision": rev, "max_tokens": OUTPUT_TOKENS} for _, rev in work]
    more = np.random.default_rng(1).integers(100, 40000, 9).tolist()
    turn = [item | {"prompt": more, "continues": True} for item in batch]
    configurations: dict[str, dict[str, Any]] = {
        "plain": {"enable_prefix_caching": False},
        "chunked": {
            "enable_prefix_caching": True,
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 31,
            "block_size": 64,
        },
        # Space for three prompts of four blocks each, but not for the blocks of their answers.
        "scarce": {
            "enable_prefix_caching": True,
            "num_gpu_blocks_override": 14,
            "max_model_len": 256,
            "max_num_batched_tokens": 2048,
        },
    }
    found: dict[str, dict[str, Any]] = {}
    for name, options in configurations.items():
        asked = [batch, batch, turn]
        result = run_engine(asked, plans=list(plans.values()), dtype="float32", **options)
        for when, answers in zip(("first", "second", "turn"), result["batches"], strict=True):
            found[f"{name} {when}"] = dict(zip((kind for kind, _ in work), answers, strict=True))
        found[name] = {"preemptions": result["preemptions"]}
    return found


WAYS = [f"{name} {when}" for name in ("plain", "chunked", "scarce") for when in ("first", "second", "turn")]


@pytest.mark.parametrize("way", WAYS)
def test_verdict_does_not_depend_on_chunks_cache_preemption_or_turn(
    runs: dict[str, dict[str, Any]], way: str
) -> None:
    """Answers, and the counts of open gates, are those of the engine without cache and chunks."""
    plain = runs[f"plain {'turn' if way.endswith('turn') else 'first'}"]
    for kind, answer in runs[way].items():
        assert answer["tokens"] == plain[kind]["tokens"], kind
        if not way.startswith("scarce"):  # recomputed tokens count again
            assert answer["receipt"]["gates_fired"] == plain[kind]["receipt"]["gates_fired"], kind


def test_engines_really_preempted_and_cached(runs: dict[str, dict[str, Any]]) -> None:
    """The comparison is meaningful: requests were preempted, and prompts came from the cache."""
    assert runs["scarce"]["preemptions"] > 0
    assert all(answer["cached"] >= 64 for answer in runs["chunked second"].values())
    assert all(answer["cached"] >= 64 for answer in runs["chunked turn"].values())


def test_gates_open_where_they_should(runs: dict[str, dict[str, Any]]) -> None:
    """The window opens what the whole prompt's mean leaves shut, and the answer's gates open at one token."""
    fired = {kind: runs["plain first"][kind]["receipt"]["gates_fired"] for kind in FIRED}
    assert fired == FIRED


def test_request_is_unsteered_until_its_gate_opens(runs: dict[str, dict[str, Any]]) -> None:
    """Up to the opening token, tokens and log-probabilities are those without a policy; then they differ."""
    plain = runs["plain first"]
    none = plain["none"]
    for kind in ("answer", "beside"):
        for what in ("tokens", "logprobs"):
            assert plain[kind][what][: LATE + 1] == none[what][: LATE + 1]
            assert plain[kind][what][LATE + 1] != none[what][LATE + 1]
    for kind in ("whole", "shut answer"):
        assert plain[kind]["tokens"] == none["tokens"]
        assert plain[kind]["logprobs"] == none["logprobs"]
        assert plain[kind]["receipt"]["edits_applied"] == 0


def test_session_opens_the_gates_that_the_engine_opens(
    runs: dict[str, dict[str, Any]], plans: dict[str, Plan], default_model_dir: Path
) -> None:
    """A session that scores the engine's answers opens each gate at as many tokens."""
    model = HookedModel(default_model_dir, dtype="float32")
    prompt = make_prompt()
    for kind, fired in FIRED.items():
        with SteeringSession(model, plans[kind]) as session:
            session.logprobs([*prompt, *runs["plain first"][kind]["tokens"][:-1]], prompt_length=len(prompt))
            assert session.receipt.gates_fired == fired, kind
