"""Requests of five revisions and of none in one engine do not influence each other (promises 2, 3, 4, 7)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interpretops.plan import Plan

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SYSTEM = "You are a careful assistant who answers in plain words and never in more than two sentences. " * 6
QUESTIONS = [
    "What is the capital of France?",
    "How do plants make sugar?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "What does a compiler do?",
    "Who wrote Hamlet?",
    "How far away is the moon?",
    "What is a prime number?",
    "How do I boil an egg?",
    "What is the largest ocean?",
    "Explain gravity to a child.",
    "What is jazz?",
    "How many legs has a spider?",
    "What is a leap year?",
    "Why do cats purr?",
    "What is the speed of light?",
]
# Requests end at different steps, so that the engine condenses and reorders its batch.
LENGTHS = [8, 24, 12, 20, 16, 24, 9, 22, 11, 24, 18, 13, 24, 10, 21, 15]


@pytest.fixture(scope="module")
def prompts(default_model_dir: Path) -> list[list[int]]:
    """Sixteen prompts that share a long system prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)
    return [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def batches(
    prompts: list[list[int]], make_plan: Callable[..., Plan], run_engine: Callable[..., Any]
) -> dict[str, Any]:
    """One mixed batch, one pure batch per kind, the mixed one again from the cache; and an engine without the
    plugin.

    In float32: where a processor multiplies bfloat16 in tiles, sums depend on the shape of the batch, also
    without the plugin.
    """
    plans = [make_plan(60.0, layer=5 + 4 * seed, seed=seed) for seed in range(5)]
    kinds = [plan.revision for plan in plans] + ["none"]
    mix = [kinds[(index * 5 + index // 6) % 6] for index in range(16)]
    assert set(mix) == set(kinds)

    def batch(revisions: list[str]) -> list[dict[str, Any]]:
        return [
            {"prompt": prompt, "revision": revision, "max_tokens": length}
            for prompt, revision, length in zip(prompts, revisions, LENGTHS, strict=True)
        ]

    jobs = [batch(mix), *(batch([kind] * 16) for kind in kinds), batch(mix)]
    how: dict[str, Any] = {"enable_prefix_caching": True, "dtype": "float32"}
    ours = run_engine(jobs, plans=plans, **how)["batches"]
    vanilla = run_engine([batch(["none"] * 16)] * 2, plugin=False, **how)["batches"]
    return {
        "mix": mix,
        "mixed": ours[0],
        "pure": dict(zip(kinds, ours[1:7], strict=True)),
        "cached": ours[7],
        "vanilla": vanilla[0],
        "vanilla_cached": vanilla[1],
    }


def test_request_in_a_mixed_batch_equals_itself_in_a_pure_batch(batches: dict[str, Any]) -> None:
    """In a mixed batch every request's tokens equal those of a pure batch of the same shape."""
    for index, revision in enumerate(batches["mix"]):
        assert batches["mixed"][index]["tokens"] == batches["pure"][revision][index]["tokens"], index


def test_unsteered_request_equals_an_engine_without_the_plugin(batches: dict[str, Any]) -> None:
    """`none` beside steered requests: bit-identical to vLLM without the plugin, token by token."""
    for index, revision in enumerate(batches["mix"]):
        if revision == "none":
            for ours in (batches["mixed"][index], batches["pure"]["none"][index]):
                assert ours["tokens"] == batches["vanilla"][index]["tokens"]
            pure = batches["pure"]["none"][index]
            assert pure["logprobs"] == batches["vanilla"][index]["logprobs"]


def test_revisions_differ(batches: dict[str, Any]) -> None:
    """The edits have an effect: no two kinds answer all prompts alike."""
    answers = [str([request["tokens"] for request in pure]) for pure in batches["pure"].values()]
    assert len(set(answers)) == len(answers)


def test_cache_hits_change_no_answer_and_cross_no_revision(batches: dict[str, Any]) -> None:
    """With the shared system prompt from the prefix cache, each kind still gets its own blocks."""
    for index, revision in enumerate(batches["mix"]):
        request = batches["cached"][index]
        assert request["cached"] > 0
        assert request["receipt"]["cached_tokens"] == request["cached"]
        assert request["tokens"] == batches["pure"][revision][index]["tokens"], index
    for index in range(16):
        first = batches["vanilla"][index]["tokens"]
        assert batches["vanilla_cached"][index]["tokens"] == first


def test_receipts_count_tokens_and_edits(batches: dict[str, Any]) -> None:
    """Every evaluated token of a steered request was edited once, at its only site; others never."""
    for index, revision in enumerate(batches["mix"]):
        receipt = batches["mixed"][index]["receipt"]
        assert receipt["revision"] == revision
        assert receipt["requests"] == 1
        expected = 0 if revision == "none" else receipt["tokens_evaluated"]
        assert receipt["edits_applied"] == expected
