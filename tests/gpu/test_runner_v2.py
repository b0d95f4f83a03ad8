"""The runners on a GPU, V2 above all, which vLLM uses wherever Triton works: the same facts as on a CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from interpretops.plan import Gate, ModelSpec, Plan, Site

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.slow]

PROMPT = list(range(100, 180))
MOST = 8
"""Tokens of the shortest answer."""


def gate_of(spec: ModelSpec, *, cut: float, **settings: Any) -> Gate:
    read = np.zeros((1, spec.hidden_size), np.float32)
    read[0, 0] = 1.0
    return Gate(Site(3, "resid_post"), read, np.zeros(1, np.float32), np.full(1, cut, np.float32), **settings)


@pytest.mark.parametrize(
    ("runner", "graphs"), [("v2", True), ("v2", False), ("v1", True)], ids=["v2 graphs", "v2 eager", "v1"]
)
def test_mixed_batch_equals_pure_batches_and_vanilla(
    runner: str,
    graphs: bool,
    spec: ModelSpec,
    make_plan: Callable[..., Plan],
    run_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Captured or not, neighbours do not influence each other, gates hold, `none` is vanilla vLLM's.

    The second run of a batch finds all of its prompts but the last token in the prefix cache: a prompt of one
    token, which V2 takes for a decode step, and whose gate must be read all the same.
    """
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if runner == "v2" else "0")
    settings: dict[str, Any] = {
        "enable_prefix_caching": True,
        "enforce_eager": not graphs,
        "block_size": 16,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 2 * 2**30,
    }
    if graphs:
        settings["cudagraph_capture_sizes"] = [1, 2, 4, 8, 16]
    always, open_, shut = -1e9, -1e9, 1e9
    gates = {
        "always": None,
        "every token": gate_of(spec, cut=always),
        "prompt's end": gate_of(spec, cut=open_, scope="prompt_end", latched=True),
        "shut": gate_of(spec, cut=shut, scope="prompt_end", latched=True),
        "shut at every token": gate_of(spec, cut=shut),
    }
    plans = [make_plan(60.0, layer=6, seed=seed, gate=gate) for seed, gate in enumerate(gates.values())]
    kinds = [plan.revision for plan in plans] + ["none"]
    mix = [kinds[index % len(kinds)] for index in range(12)]

    def batch(revisions: list[str]) -> list[dict[str, Any]]:
        return [
            {"prompt": [*PROMPT, 200 + index], "revision": revision, "max_tokens": MOST + index}
            for index, revision in enumerate(revisions)
        ]

    jobs = [batch(mix), *(batch([kind] * 12) for kind in kinds), *(batch([kind] * 12) for kind in kinds)]
    mixed, *rest = run_engine(jobs, plans=plans, **settings)["batches"]
    pure, again = rest[: len(kinds)], rest[len(kinds) :]
    (vanilla,) = run_engine([batch(["none"] * 12)], plugin=False, **settings)["batches"]
    for index, revision in enumerate(mix):
        assert mixed[index]["tokens"] == pure[kinds.index(revision)][index]["tokens"], (index, revision)
    for name, answers in zip([*gates, "none"], pure, strict=True):
        for index, answer in enumerate(answers):
            receipt, tokens = answer["receipt"], answer["tokens"]
            if name in ("always", "every token"):
                assert receipt["edits_applied"] == receipt["tokens_evaluated"], (name, index)
            elif name == "prompt's end":  # the prompt's last token, and every one but the answer's last
                assert receipt["edits_applied"] == MOST + index, (name, index)
            else:
                assert receipt["edits_applied"] == 0, (name, index)
                assert tokens == vanilla[index]["tokens"], (name, index)
    assert pure[0][0]["tokens"] != pure[1][0]["tokens"]
    second = again[list(gates).index("prompt's end")]
    assert {answer["cached"] for answer in second} == {len(PROMPT)}
    assert [answer["receipt"]["edits_applied"] for answer in second] == [MOST + index for index in range(12)]


@pytest.mark.parametrize("runner", ["v2", "v1"])
@pytest.mark.parametrize("ahead", [True, False], ids=["async", "sync"])
def test_refusal_gate_stops_a_constrained_request_at_its_first_token(
    runner: str,
    ahead: bool,
    spec: ModelSpec,
    make_plan: Callable[..., Plan],
    run_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With graphs, and with a step scheduled ahead: one token; neighbours and unconstrained ones run on."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if runner == "v2" else "0")
    gates = [gate_of(spec, cut=cut, scope="prompt_end", latched=True, refusal="No.") for cut in (-1e9, 1e9)]
    opens, shut = (make_plan(60.0, layer=6, seed=seed, gate=gate) for seed, gate in enumerate(gates))
    form = {"max_tokens": MOST, "regex": "[a-z ]{90}"}
    asked = [
        {**form, "revision": opens.revision},
        {**form, "revision": shut.revision},
        {"max_tokens": MOST, "revision": opens.revision},
        {**form, "revision": "none"},
    ]
    batch = [{**item, "prompt": [*PROMPT, 200 + index]} for index, item in enumerate(asked)]
    settings = {"async_scheduling": ahead, "enforce_eager": False, "cudagraph_capture_sizes": [1, 2, 4]}
    memory = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 * 2**30}
    (answers,) = run_engine([batch], plans=[opens, shut], **settings, **memory)["batches"]
    assert [len(answer["tokens"]) for answer in answers] == [1, MOST, MOST, MOST]
    assert [answer["receipt"]["refusals"] for answer in answers] == [1, 0, 1, 0]
    assert all(answer["receipt"]["finished"] for answer in answers)
