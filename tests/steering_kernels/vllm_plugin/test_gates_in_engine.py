"""Gates in the real engine decide the same however the scheduler chunks, caches and repeats (promises 5,
8)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from interpretops.plan import Gate, ModelSpec, Plan, ProbePart, Site

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT_TOKENS = 125
OUTPUT_TOKENS = 12
NEXT_TOKENS = 9
TURNS = 3


def make_gate(spec: ModelSpec, *, cut: float = 0.0, **options: Any) -> Gate:
    """Reads the stream after layer 6 along a random direction: about half of all tokens lie above 0."""
    read = np.random.default_rng(7).normal(size=(1, spec.hidden_size)).astype(np.float32)
    read /= np.linalg.norm(read)
    return Gate(
        Site(6, "resid_post"),
        read,
        np.zeros(1, np.float32),
        np.full(1, cut, np.float32),
        **options,
    )


TURN_NAMES = [f"turn {turn}" for turn in range(2, TURNS + 1)]

# The whole prompt reads -4.4, its largest window of 32 tokens -0.3.
PROMPT_CUTS = (-200.0, -12.0, -6.0, -2.0, 6.0, 12.0, 200.0)
PROMPT_KINDS = [f"prompt {cut}" for cut in PROMPT_CUTS]
WINDOW = 32
WINDOW_KINDS = [f"windows {cut}" for cut in PROMPT_CUTS]


def prompt_gate(spec: ModelSpec, cut: float, window: int | None = None) -> Gate:
    """An attention probe of two heads after layer 3 and two after layer 6."""
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
        Site(6, "resid_post"),
        np.zeros((0, 0), np.float32),
        np.zeros(0, np.float32),
        np.full(1, cut, np.float32),
        scope="prompt",
        latched=True,
        probe=tuple(parts),
        window=window,
    )


def phase_gate(phase: Any) -> Gate:
    nothing = np.zeros(0, np.float32)
    return Gate(None, np.zeros((0, 0), np.float32), nothing, nothing, phase=phase)


@pytest.fixture(scope="module")
def runs(
    spec: ModelSpec, make_plan: Callable[..., Plan], run_engine: Callable[..., Any]
) -> dict[str, dict[str, Any]]:
    """The same conversations in float32 on four engines: plain; two cached in chunks; one short of memory."""
    plans = {
        "token": make_plan(80.0, gate=make_gate(spec)),
        "latched": make_plan(80.0, gate=make_gate(spec, cut=6.0, latched=True)),
        "prompt_end": make_plan(80.0, gate=make_gate(spec, cut=-100.0, scope="prompt_end", latched=True)),
        "closed": make_plan(80.0, gate=make_gate(spec, cut=100.0, scope="prompt_end", latched=True)),
        **{
            kind: make_plan(80.0, gate=prompt_gate(spec, cut))
            for kind, cut in zip(PROMPT_KINDS, PROMPT_CUTS, strict=True)
        },
        **{
            kind: make_plan(80.0, gate=prompt_gate(spec, cut, WINDOW))
            for kind, cut in zip(WINDOW_KINDS, PROMPT_CUTS, strict=True)
        },
        "prefill": make_plan(80.0, gate=phase_gate("prefill")),
        "decode": make_plan(80.0, gate=phase_gate("decode")),
    }
    rng = np.random.default_rng(0)
    prompt = [1, *rng.integers(100, 40000, PROMPT_TOKENS - 1).tolist()]
    work = [("none", "none"), *((name, plan.revision) for name, plan in plans.items())]
    batch = [{"prompt": prompt, "revision": revision, "max_tokens": OUTPUT_TOKENS} for _, revision in work]
    turns = [
        [
            {"prompt": rng.integers(100, 40000, NEXT_TOKENS).tolist(), "continues": True, **rest}
            for rest in ({key: item[key] for key in ("revision", "max_tokens")} for item in batch)
        ]
        for _ in range(TURNS - 1)
    ]
    configurations: dict[str, dict[str, Any]] = {
        "plain": {"enable_prefix_caching": False},
        # Chunks of 31: the last one of a 125-token prompt is a single token, like a decode step.
        "chunked": {
            "enable_prefix_caching": True,
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 31,
            "block_size": 64,  # the CPU's attention needs multiples of 32
        },
        "large blocks": {
            "enable_prefix_caching": True,
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 100,
            "block_size": 128,
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
        asked = [batch, batch, *turns]
        result = run_engine(asked, plans=list(plans.values()), dtype="float32", **options)
        for when, answers in zip(("first", "second", *TURN_NAMES), result["batches"], strict=True):
            found[f"{name} {when}"] = dict(zip((kind for kind, _ in work), answers, strict=True))
        found[name] = {"preemptions": result["preemptions"]}
    return found


CACHED = ["chunked", "large blocks", "scarce"]
ENGINES = ["plain second", *(f"{name} {half}" for name in CACHED for half in ("first", "second"))]
KINDS = [
    "none",
    "token",
    "latched",
    "prompt_end",
    "closed",
    "prefill",
    "decode",
    *PROMPT_KINDS,
    *WINDOW_KINDS,
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_gates_do_not_depend_on_chunks_cache_or_preemption(
    runs: dict[str, dict[str, Any]], engine: str, kind: str
) -> None:
    """With every kind of gate the answer equals the plain engine's, token by token."""
    assert runs[engine][kind]["tokens"] == runs["plain first"][kind]["tokens"]


@pytest.mark.parametrize("turn", TURN_NAMES)
@pytest.mark.parametrize("engine", CACHED)
@pytest.mark.parametrize("kind", KINDS)
def test_gates_on_a_conversation_do_not_depend_on_the_cache(
    runs: dict[str, dict[str, Any]], engine: str, kind: str, turn: str
) -> None:
    """Later turns, whose prompts contain the engine's own answers, get the same decisions and answers."""
    ours, plain = runs[f"{engine} {turn}"][kind], runs[f"plain {turn}"][kind]
    assert ours["tokens"] == plain["tokens"]
    if kind in (*PROMPT_KINDS, *WINDOW_KINDS) and engine != "scarce":  # recomputed tokens count again
        assert ours["receipt"]["gates_fired"] == plain["receipt"]["gates_fired"]


def test_engines_really_preempted_and_cached(runs: dict[str, dict[str, Any]]) -> None:
    """The comparison is meaningful: requests were preempted, and prompts came from the cache."""
    assert runs["scarce"]["preemptions"] > 0
    assert runs["chunked second"]["prompt_end"]["cached"] > 0
    assert runs["plain second"]["prompt_end"]["cached"] == 0
    for kind in (
        "none",
        *PROMPT_KINDS,
    ):  # the first turn's prompt is cached, and its answer if it was not edited
        assert runs["chunked turn 2"][kind]["cached"] >= 64


def test_whole_prompt_is_read_from_the_cache_too(runs: dict[str, dict[str, Any]]) -> None:
    """A low cut opens the gate and a high one does not; prompts of such gates are cached."""
    opened = [runs["plain first"][kind]["receipt"]["gates_fired"] for kind in PROMPT_KINDS]
    assert opened == sorted(opened, reverse=True)
    assert {opened[0], opened[-1]} == {0, OUTPUT_TOKENS}
    assert all(runs["chunked second"][kind]["cached"] > 0 for kind in PROMPT_KINDS)


def test_windows_open_gates_that_the_whole_prompt_does_not(runs: dict[str, dict[str, Any]]) -> None:
    """The largest window opens the gate at cuts that the mean over the prompt does not reach."""
    whole, windows = (
        [runs["plain first"][kind]["receipt"]["gates_fired"] for kind in kinds]
        for kinds in (PROMPT_KINDS, WINDOW_KINDS)
    )
    assert windows == sorted(windows, reverse=True)
    assert {windows[0], windows[-1]} == {0, OUTPUT_TOKENS}
    assert sum(windows) > sum(whole)
    assert all(runs["chunked second"][kind]["cached"] > 0 for kind in WINDOW_KINDS)


def test_latch_over_all_tokens_uses_no_cached_blocks(runs: dict[str, dict[str, Any]]) -> None:
    """A decision that needs every prompt token never uses cached blocks, whose tokens are not scored
    again."""
    assert runs["chunked second"]["latched"]["cached"] == 0


def test_phase_is_decided_by_position(runs: dict[str, dict[str, Any]]) -> None:
    """A one-token chunk of the prompt is prefill: counts are exact on every engine."""
    for engine in ("plain first", "chunked first"):
        prefill, decode = (runs[engine][kind]["receipt"] for kind in ("prefill", "decode"))
        assert prefill["edits_applied"] == PROMPT_TOKENS
        # The first generated token comes from the prompt's last one; the last is sampled but never evaluated.
        assert decode["edits_applied"] == OUTPUT_TOKENS


def test_closed_gate_leaves_the_answer_unsteered(runs: dict[str, dict[str, Any]]) -> None:
    """A closed gate gives the unsteered answer; an open one gives another."""
    plain = runs["plain first"]
    assert plain["closed"]["tokens"] == plain["none"]["tokens"]
    assert plain["closed"]["receipt"]["edits_applied"] == 0
    assert plain["prompt_end"]["tokens"] != plain["none"]["tokens"]
    assert plain["prompt_end"]["receipt"]["edits_applied"] == OUTPUT_TOKENS


def test_gate_at_the_prompt_end_edits_that_very_token_first(runs: dict[str, dict[str, Any]]) -> None:
    """A latched prompt-end gate opens at the prompt's last token and stays open."""
    receipt = runs["plain first"]["prompt_end"]["receipt"]
    assert receipt["gates_fired"] == OUTPUT_TOKENS
