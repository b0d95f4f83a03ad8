"""A worker's runtime over a tiny model: what it stores of a request, and for how long (promise 5)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import save_family
from transformers import AutoModelForCausalLM

from interpretops.model.spec import read_model_spec
from interpretops.plan import ALWAYS, Gate, Plan, Site, SiteEdits, Units
from steering_kernels.vllm_plugin.engine_config import EngineOptions
from steering_kernels.vllm_plugin.request_args import RequestArgsError
from steering_kernels.vllm_plugin.worker.runtime import SteeringRuntime

NONCE = "0" * 32


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> tuple[SteeringRuntime, Any, Plan]:
    """A runtime, its model, and a resident plan: an edit after layer 1 behind a prompt-end latch."""
    folder = save_family("LlamaForCausalLM", tmp_path_factory.mktemp("model"))
    spec = read_model_spec(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runtime = SteeringRuntime(model, spec, EngineOptions(), max_requests=4, device=torch.device("cpu"))
    runtime.hooks.residual_pair = False
    one, infinite = np.ones(1, np.float32), np.full(1, np.inf, np.float32)
    units = Units(
        read=np.zeros((1, spec.hidden_size), np.float32),
        write=np.ones((1, spec.hidden_size), np.float32),
        bias=0 * one,
        threshold=-infinite,
        gain=0 * one,
        offset=one,
        low=-infinite,
        high=infinite,
        max_norm=infinite,
        gate=np.ones(1, np.int32),
        topk=np.full(1, -1, np.int32),
    )
    gate = Gate(
        Site(0, "resid_post"),
        np.zeros((1, spec.hidden_size), np.float32),
        one,
        0 * one,
        scope="prompt_end",
        latched=True,
    )
    plan = Plan("latched", "test", spec, {Site(1, "resid_post"): SiteEdits(units)}, (ALWAYS, gate))
    runtime.load(plan)
    return runtime, model, plan


def run(runtime: SteeringRuntime, model: Any, request: str, first: int, count: int) -> int:
    """One pass over some tokens of a request with a prompt of 5; returns its edits so far."""
    runtime.begin_step([request], [count], [first], [5])
    with torch.no_grad():
        model(torch.arange(1, count + 1)[None])
    return int(runtime.reports().take()[request][3])


def arguments(revision: str) -> dict[str, str]:
    return {"interpretops_revision": revision, "interpretops_nonce": NONCE}


def test_latch_survives_preemption_with_a_cached_prompt(
    steered: tuple[SteeringRuntime, Any, Plan],
) -> None:
    """A resumed request with a cached prompt keeps its gate open from where it fired."""
    runtime, model, plan = steered
    runtime.track("a", arguments(plan.revision), 0)
    assert run(runtime, model, "a", 0, 5) == 1
    assert run(runtime, model, "a", 5, 1) == 2
    runtime.track("a", arguments(plan.revision), 5)  # the V2 runner reports a resumed request as a new one
    assert run(runtime, model, "a", 6, 1) == 3
    runtime.untrack("a")


def test_tokens_found_in_the_cache_after_a_preemption_are_counted(
    steered: tuple[SteeringRuntime, Any, Plan],
) -> None:
    """Evaluated plus cached tokens cover every token, also those that others computed meanwhile."""
    runtime, model, plan = steered
    runtime.track("h", arguments(plan.revision), 1)
    run(runtime, model, "h", 1, 1)
    # Preempted after two of five; three came from the cache, two of which it had computed before.
    run(runtime, model, "h", 4, 1)
    report = runtime.reports().take()["h"]
    assert (report[2], report[5]) == (2, 3)
    run(runtime, model, "h", 0, 5)
    assert runtime.reports().take()["h"][2::3] == [7, 3]
    runtime.untrack("h")


def test_next_request_in_a_slot_starts_with_closed_gates(
    steered: tuple[SteeringRuntime, Any, Plan],
) -> None:
    """A request that reuses a slot inherits neither latch nor counts."""
    runtime, model, plan = steered
    runtime.track("b", arguments(plan.revision), 0)
    assert run(runtime, model, "b", 0, 5) == 1
    runtime.untrack("b")
    runtime.track("c", arguments(plan.revision), 0)
    assert run(runtime, model, "c", 2, 1) == 0
    runtime.untrack("c")


def test_edits_are_attested_by_revision(steered: tuple[SteeringRuntime, Any, Plan]) -> None:
    """A self-test finds its own edits among those of other requests, running or finished."""
    runtime, model, plan = steered
    before = runtime.edits().get(plan.revision, 0)
    runtime.track("f", arguments(plan.revision), 0)
    run(runtime, model, "f", 0, 5)
    assert runtime.edits()[plan.revision] == before + 1
    runtime.untrack("f")
    runtime.track("g", arguments("none"), 0)
    runtime.untrack("g")
    assert runtime.edits() == {plan.revision: before + 1}


def test_pass_with_an_invalid_layout_does_not_run(steered: tuple[SteeringRuntime, Any, Plan]) -> None:
    """An unknown request, a revision that is not resident, or a missing revision raises."""
    runtime, _model, _plan = steered
    with pytest.raises(KeyError):
        runtime.begin_step(["unknown"], [1], [0], [1])
    runtime.track("d", arguments("f" * 64), 0)
    with pytest.raises(KeyError):
        runtime.begin_step(["d"], [1], [0], [1])
    runtime.untrack("d")
    with pytest.raises(RequestArgsError, match="every request must name"):
        runtime.track("e", {}, 0)


def test_pass_between_two_steps_raises(steered: tuple[SteeringRuntime, Any, Plan]) -> None:
    """A pass that was not laid out raises in the model; a dummy pass does not."""
    runtime, model, _plan = steered
    runtime.end_step()
    with pytest.raises(RuntimeError, match="before its batch was laid out"):
        model(torch.arange(1, 3)[None])
    runtime.clear_step()
    model(torch.arange(1, 3)[None])


def test_hooks_exist_only_where_a_resident_plan_acts(
    steered: tuple[SteeringRuntime, Any, Plan], tmp_path: Path
) -> None:
    """An idle engine runs the model's own code: unloading the last plan removes all hooks."""
    runtime, model, plan = steered

    def hooked() -> list[str]:
        return [name for name, module in model.named_modules() if module._forward_hooks]

    assert hooked() == ["model.layers.0", "model.layers.1"]
    runtime.unload(plan.revision)
    assert hooked() == []
    runtime.load(plan)
