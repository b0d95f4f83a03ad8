"""The V2 model runner, which vLLM uses wherever Triton works: the same facts as on the CPU's V1 runner."""

from collections.abc import Callable
from typing import Any

import pytest

from interpretops.plan import Plan

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.slow]

PROMPT = list(range(100, 180))


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled and with graphs"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_mixed_batch_equals_pure_batches_and_vanilla(
    runner: str,
    eager: bool,
    make_plan: Callable[..., Plan],
    run_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU too, captured or not, neighbours do not influence each other, and `none` is vanilla vLLM's."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if runner == "v2" else "0")
    settings = {"enable_prefix_caching": True, "enforce_eager": eager}
    plans = [make_plan(60.0, layer=6 + 6 * seed, seed=seed) for seed in range(2)]
    kinds = [plan.revision for plan in plans] + ["none"]
    mix = [kinds[index % 3] for index in range(12)]

    def batch(revisions: list[str]) -> list[dict[str, Any]]:
        return [
            {"prompt": [*PROMPT, 200 + index], "revision": revision, "max_tokens": 8 + index}
            for index, revision in enumerate(revisions)
        ]

    jobs = [batch(mix), *(batch([kind] * 12) for kind in kinds)]
    mixed, *pure = run_engine(jobs, plans=plans, **settings)["batches"]
    (vanilla,) = run_engine([batch(["none"] * 12)], plugin=False, **settings)["batches"]
    for index, revision in enumerate(mix):
        own = pure[kinds.index(revision)][index]
        assert mixed[index]["tokens"] == own["tokens"], (index, revision)
        receipt = own["receipt"]
        assert receipt["edits_applied"] == (0 if revision == "none" else receipt["tokens_evaluated"])
        if revision == "none":
            assert mixed[index]["tokens"] == vanilla[index]["tokens"]
    assert pure[0][0]["tokens"] != pure[1][0]["tokens"]
