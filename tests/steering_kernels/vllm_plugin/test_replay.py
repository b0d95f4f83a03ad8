"""Which steps may be replayed from a whole-model graph, and what such a graph reads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import vector_plan
from tiny_families import save_family
from transformers import AutoModelForCausalLM

from interpretops.model.spec import read_model_spec
from interpretops.plan import Gate, Plan, Site, SiteEdits, TopK
from steering_kernels.ops import site_op
from steering_kernels.vllm_plugin.engine_config import EngineOptions
from steering_kernels.vllm_plugin.request_args import RequestArgsError
from steering_kernels.vllm_plugin.worker.runtime import SteeringRuntime

ROOM = 8
PROMPT = 5
MakeRuntime = Callable[..., SteeringRuntime]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("LlamaForCausalLM", tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture
def make_runtime(model_folder: Path, model: Any) -> MakeRuntime:
    def make(graph_tokens: int = ROOM) -> SteeringRuntime:
        spec, device = read_model_spec(model_folder), torch.device("cpu")
        made = SteeringRuntime(
            model, spec, EngineOptions(), max_requests=4, device=device, graph_tokens=graph_tokens
        )
        made.hooks.residual_pair = False
        return made

    return make


def plan_with(runtime: SteeringRuntime, **gate: Any) -> Plan:
    """A vector at layer 1 behind a gate with these settings that fires wherever it reads; without settings,
    no gate."""
    if not gate:
        return vector_plan(runtime.spec, 1.0, layer=1)
    read = torch.zeros(1, runtime.spec.hidden_size).numpy()
    one = read[0, :1] + np.float32(1)
    return vector_plan(
        runtime.spec, 1.0, layer=1, gate=Gate(Site(0, "resid_post"), read, one, one - one, **gate)
    )


def track(runtime: SteeringRuntime, request: str, plan: Plan) -> None:
    runtime.load(plan)
    runtime.track(
        request, {"interpretops_revision": plan.revision, "interpretops_nonce": "0" * 32}, cached_tokens=0
    )


def test_step_with_decided_gates_may_be_replayed(make_runtime: MakeRuntime) -> None:
    """Ungated edits may always be replayed, a latch after its prompt; gates that must read never."""
    runtime = make_runtime()
    settings: dict[str, dict[str, Any]] = {
        "always": {},
        "latch": {"scope": "prompt_end", "latched": True},
        "tokens": {},
    }
    for name in ("always", "latch"):
        track(runtime, name, plan_with(runtime, **settings[name]))
    track(runtime, "tokens", plan_with(runtime, scope="token"))
    runtime.track("none", {"interpretops_revision": "none", "interpretops_nonce": "0" * 32}, 0)
    assert runtime.may_replay(["always", "none"], [True, True])
    assert runtime.may_replay(["latch", "always", "none"], [False, True, True])
    assert not runtime.may_replay(["none", "latch"], [False, True])
    assert not runtime.may_replay(["none", "tokens"], [False, False])
    assert not make_runtime(graph_tokens=0).may_replay([], [])


def test_edits_that_the_kernel_cannot_make_keep_steps_out_of_graphs(make_runtime: MakeRuntime) -> None:
    """A TopK dictionary needs its whole encoder, which no graph contains."""
    runtime = make_runtime()
    plan = plan_with(runtime)
    (site,) = plan.edits
    units = plan.edits[site].units
    encoder = TopK(read=units.write.copy(), bias=units.bias.copy(), k=1)
    edits = SiteEdits(replace(units, topk=0 * units.topk), topk=encoder)
    track(runtime, "a", replace(plan, edits={site: edits}))
    assert not runtime.may_replay(["a"], [False])


def test_mistaken_replay_raises_before_anything_runs(make_runtime: MakeRuntime) -> None:
    """vLLM treats a prompt with only its last token uncached as a decode step."""
    runtime = make_runtime()
    track(runtime, "a", plan_with(runtime, scope="prompt_end", latched=True))
    with pytest.raises(RuntimeError, match="a gate that must read activations was about to be replayed"):
        runtime.begin_step(["a"], [1], [PROMPT - 1], [PROMPT], replayed=True)
    assert not runtime.bank.step.active


def test_replayed_step_has_rows_and_latched_gates_at_fixed_addresses(
    make_runtime: MakeRuntime, model: Any
) -> None:
    """The latch fires in the prompt's pass; afterwards a graph reads it at a fixed address."""
    runtime = make_runtime()
    track(runtime, "a", plan_with(runtime, scope="prompt_end", latched=True))
    step = runtime.bank.step
    rows, gates = step.row_of_token.data_ptr(), step.gate_open.data_ptr()
    runtime.begin_step(["a"], [1], [PROMPT], [PROMPT], replayed=True)
    assert not bool(step.gate_open[0, 1]), "nothing has fired yet"
    runtime.begin_step(["a"], [PROMPT], [0], [PROMPT])
    with torch.no_grad():
        model(torch.arange(1, PROMPT + 1)[None])
    runtime.begin_step(["a"], [1], [PROMPT], [PROMPT], replayed=True)
    assert bool(step.gate_open[0, 1])
    assert (step.row_of_token.data_ptr(), step.gate_open.data_ptr()) == (rows, gates)
    row = runtime.bank.row_of[next(iter(runtime.bank.row_of))]
    whole = torch.as_strided(step.row_of_token, (ROOM,), (1,))
    assert whole.tolist() == [row] + [0] * (ROOM - 1)
    runtime.clear_step()
    assert step.row_of_token.tolist() == [0] * ROOM
    runtime.begin_step(["a"], [ROOM + 1], [PROMPT], [PROMPT])  # larger than any graph
    assert whole.tolist() == [0] * ROOM


def test_only_warm_up_requests_may_name_no_policy(make_runtime: MakeRuntime) -> None:
    """vLLM's V2 runner warms up with requests of its own."""
    runtime = make_runtime()
    runtime.warming_up = True
    runtime.track("_warmup_0_", None, 0)
    with pytest.raises(RuntimeError, match="left requests behind: _warmup_0_"):
        runtime.end_warm_up(torch.bfloat16)
    runtime.untrack("_warmup_0_")
    runtime.end_warm_up(torch.bfloat16)
    plan = plan_with(runtime)
    track(runtime, "real", plan)
    runtime.begin_step(["real"], [1], [0], [PROMPT])
    (report,) = runtime.reports().take().values()
    assert report[0] == plan.revision, "a request that names a policy came under none"
    runtime.warming_up = False
    with pytest.raises(RequestArgsError):
        runtime.track("a", None, 0)


def test_captured_op_edits_in_place(model_folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op in a graph does what the step says, also for a batch of one (in the interpreter)."""
    monkeypatch.setattr(site_op, "_OWNER", [])
    spec, device = read_model_spec(model_folder), torch.device("cpu")
    runtime = SteeringRuntime(
        model, spec, EngineOptions(), max_requests=4, device=device, graph_tokens=ROOM, compiled=True
    )
    plan = plan_with(runtime)
    track(runtime, "a", plan)
    (site,) = plan.edits
    number = [Site(layer, "resid_post") for layer in range(spec.num_layers)].index(site)
    runtime.begin_step(["a"], [2], [0], [PROMPT])
    hidden = torch.zeros(1, 3, spec.hidden_size)
    runtime.hooks.capturing = True
    site_op.edit_site(hidden, torch.zeros_like(hidden), None, number)
    write = torch.from_numpy(plan.edits[site].units.write[0])
    torch.testing.assert_close(hidden[0, :2], write.expand(2, -1))
    assert not hidden[0, 2].any(), "a token past the batch was edited"
    with pytest.raises(ValueError, match="steps hold at most 8"):
        site_op.edit_site(torch.zeros(ROOM + 1, spec.hidden_size), None, None, number)
