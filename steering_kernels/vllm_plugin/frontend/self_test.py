"""The engine's self-test: runs a probe plan through the serving model; every rank must report its edits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from interpretops.engine_api import Attestation, EngineRefusal, seal
from interpretops.plan import POINTS, ModelSpec, Plan, Point, Site, SiteEdits, Units
from steering_kernels.vllm_plugin.frontend.engine_cores import EngineCores

PROMPT_TOKENS, ANSWER_TOKENS = 6, 3
"""Includes decode steps, which may use their own graph. An answer's last token does not pass the model."""


def probe_plan(spec: ModelSpec, strength: float, points: Sequence[Point] = POINTS) -> Plan:
    """A plan that adds a constant vector of the given strength at every point of the middle layer.

    Strength 0 takes the same path and must change nothing.
    """
    layer = spec.num_layers // 2
    edits = {}
    for point in points:
        width = spec.width(point)
        column = np.zeros(1, np.float32)
        unbounded = np.full(1, np.inf, np.float32)
        edits[Site(layer, point)] = SiteEdits(
            Units(
                read=np.zeros((1, spec.read_width(point)), np.float32),
                write=np.where(np.arange(width) % 2, 1.0, -1.0).astype(np.float32)[None],
                bias=column,
                threshold=-unbounded,
                gain=column,
                offset=np.full(1, strength, np.float32),
                low=-unbounded,
                high=unbounded,
                max_norm=unbounded,
                gate=np.zeros(1, np.int32),
                topk=np.full(1, -1, np.int32),
            )
        )
    return Plan("interpretops-self-test", "self-test", spec, edits)


async def run_self_test(engine_client: Any, cores: EngineCores, attested: Attestation) -> str | None:
    """None if edits act correctly on every rank; otherwise what is wrong."""
    spec = attested.spec()
    points = [point for point in POINTS if point in attested.points]
    zero_plan, edit_plan = (probe_plan(spec, strength, points) for strength in (0.0, 1.0))
    try:
        for plan in (zero_plan, edit_plan):
            answer = await cores.load(plan.revision, plan.to_bytes())
            if isinstance(answer, EngineRefusal):
                return f"the probe plan was refused: {answer.message}"
        before = await _edits_by_rank(cores, edit_plan.revision)
        unsteered = await _top_logprobs(engine_client, zero_plan.revision)
        zero_edits = await _edits_by_rank(cores, zero_plan.revision)
        if any(count for ranks in zero_edits for count in ranks.values()):
            return "an edit of strength 0 was counted as applied"
        steered = await _top_logprobs(engine_client, edit_plan.revision)
        after = await _edits_by_rank(cores, edit_plan.revision)
    finally:
        for plan in (zero_plan, edit_plan):
            await cores.retire(plan.revision)
    if steered == unsteered:
        return "an edit that must change the model's output did not"
    expected = (PROMPT_TOKENS + ANSWER_TOKENS - 1) * len(edit_plan.edits)
    # Each request goes to one engine core; every rank of that core must have applied the edits.
    idle = [
        [rank for rank, count in engine.items() if count - before[index][rank] < expected]
        for index, engine in enumerate(after)
    ]
    if all(idle):
        return f"no engine core applied all {expected} edits; ranks that did not: {idle}"
    partial = [ranks for index, ranks in enumerate(idle) if ranks and len(ranks) < len(after[index])]
    return f"ranks {partial} did not apply the edits that others did" if partial else None


async def _edits_by_rank(cores: EngineCores, revision: str) -> list[dict[int, int]]:
    """Edits counted by each rank of each core for a revision. Other requests may run meanwhile."""
    return [
        {rank.rank: rank.edits.get(revision, 0) for rank in engine.ranks} for engine in await cores.attest()
    ]


async def _top_logprobs(engine_client: Any, revision: str) -> dict[int, float]:
    """Log-probabilities of the most likely first tokens after a fixed prompt under a revision."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=ANSWER_TOKENS,
        ignore_eos=True,
        logprobs=5,
        extra_args=seal(revision, secrets.token_hex(16)),
    )
    prompt = {"prompt_token_ids": list(range(5, 5 + PROMPT_TOKENS))}
    result = None
    async for output in engine_client.generate(
        prompt, params, request_id=f"self-test-{secrets.token_hex(8)}"
    ):
        result = output
    if result is None or not result.outputs[0].logprobs:
        raise RuntimeError("the engine gave no answer to the self-test")
    return {token: entry.logprob for token, entry in result.outputs[0].logprobs[0].items()}
