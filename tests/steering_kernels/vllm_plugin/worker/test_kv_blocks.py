"""Which blocks a step gives to requests, and which tokens may stay in the prefix cache."""

from types import SimpleNamespace as Of
from typing import Any

import numpy as np
import pytest

from interpretops.plan import ALWAYS, Gate, ModelSpec, Plan
from interpretops.plan.reach import depends_on_prompt_end
from steering_kernels.vllm_plugin.core.engine_core import admit, cache_use, cacheable_tokens
from steering_kernels.vllm_plugin.core.registry import Registry
from steering_kernels.vllm_plugin.worker.kv_blocks import new_blocks

SPEC = ModelSpec("m", "f" * 64, "LlamaForCausalLM", 8, 2, 2, 2, 4, 32)


def plan(**options: Any) -> Plan:
    nothing = np.zeros(0, np.float32)
    gates = (
        (ALWAYS, Gate(None, np.zeros((0, 0), np.float32), nothing, nothing, **options))
        if options
        else (ALWAYS,)
    )
    return Plan("p", "test", SPEC, {}, gates)


@pytest.mark.parametrize(
    ("options", "depends"),
    [
        ({}, False),
        ({"scope": "token"}, False),
        ({"latched": True}, False),
        ({"phase": "decode"}, True),
        ({"phase": "prefill"}, True),
        ({"scope": "prompt_end"}, True),
        ({"scope": "prompt", "latched": True}, True),
    ],
)
def test_answers_stay_cached_only_without_prompt_end_gates(options: dict[str, Any], depends: bool) -> None:
    """Tokens before a prompt's last one may be cached; later ones only without prompt-end gates."""
    ours = plan(**options)
    assert depends_on_prompt_end(ours) is depends
    registry = Registry(pass_through=True)
    registry.add("a" * 64, "digest", cache_use(ours))
    arguments = {"interpretops_revision": "a" * 64, "interpretops_nonce": "0" * 32}
    # A value that a caller put there does not count.
    arguments["interpretops_prompt_blocks_only"] = not depends  # type: ignore[assignment]
    params = Of(extra_args=arguments, skip_reading_prefix_cache=None)
    admit(registry, Of(request_id="r", sampling_params=params, cache_salt=None))
    request = Of(sampling_params=params, num_prompt_tokens=40)
    assert [cacheable_tokens(request, tokens) for tokens in (32, 40, 96)] == (
        [32, 39, 39] if depends else [32, 40, 96]
    )


def test_new_blocks_hold_nothing_of_their_request() -> None:
    """Cache hits of a new or resumed request are kept; all other blocks handed out in a step are new."""
    step = Of(
        scheduled_new_reqs=[
            Of(block_ids=([1, 2, 3],), num_computed_tokens=0),
            Of(block_ids=([4, 5, 6],), num_computed_tokens=64),
        ],
        scheduled_cached_reqs=Of(
            req_ids=["running", "idle", "resumed"],
            new_block_ids=[([7],), None, ([8, 9],)],
            num_computed_tokens=[96, 40, 32],
            resumed_req_ids={"resumed"},
        ),
    )
    assert new_blocks(step, 32) == [1, 2, 3, 6, 7, 9]
