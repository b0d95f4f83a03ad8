"""The plugin's routes with its own cores and workers, without vLLM in between."""

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from engines import vector_plan
from fastapi import FastAPI
from tiny_families import save_family
from transformers import AutoModelForCausalLM

from interpretops.engine_api import (
    ATTEST_ROUTE,
    REFUSAL_HEADER,
    Attestation,
    EngineCode,
    EngineRefusal,
    LoadedPlan,
    RetiredPlan,
    describe_model,
    plan_path,
    receipt_path,
)
from interpretops.model.spec import read_model_spec
from interpretops.plan import POINTS, ModelSpec
from steering_kernels.vllm_plugin.core import engine_core
from steering_kernels.vllm_plugin.core.registry import Registry
from steering_kernels.vllm_plugin.engine_config import EngineOptions
from steering_kernels.vllm_plugin.frontend.http import make_plugin
from steering_kernels.vllm_plugin.worker.extension import SteeringWorker
from steering_kernels.vllm_plugin.worker.runtime import SteeringRuntime

ROWS = 3
"""One of the rows is the no-op row."""


class Worker(SteeringWorker):
    """The attributes of vLLM's worker that the extension uses."""

    def __init__(self, runtime: SteeringRuntime) -> None:
        self.rank, self.model_runner = 0, SimpleNamespace(interpretops=runtime)


class Executor:
    """Calls the only worker; results pass through JSON, as between processes."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.spoil: dict[str, Any] = {}

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        reported = json.loads(json.dumps(getattr(self.worker, method)(*args)))
        return [reported | self.spoil if self.spoil and method == "interpretops_load" else reported]


class Client:
    """vLLM's client of one engine core."""

    tokenizer = None

    def __init__(self, executor: Executor) -> None:
        parallel = SimpleNamespace(tensor_parallel_size=1)
        self.core = SimpleNamespace(
            vllm_config=SimpleNamespace(parallel_config=parallel),
            model_executor=executor,
            interpretops=Registry(pass_through=True),
        )
        self.engine_core = self

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        called = getattr(engine_core, method.removeprefix("interpretops_"))
        return [json.loads(json.dumps(called(self.core, *args)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_family("LlamaForCausalLM", tmp_path_factory.mktemp("model"))


@pytest.fixture
def spec(folder: Any) -> ModelSpec:
    return read_model_spec(folder)


@pytest.fixture
def executor(folder: Any, spec: ModelSpec) -> Executor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = EngineOptions(rows=ROWS)
    return Executor(Worker(SteeringRuntime(model, spec, options, max_requests=4, device=torch.device("cpu"))))


@pytest.fixture
async def http(executor: Executor) -> AsyncIterator[httpx.AsyncClient]:
    plugin, app = make_plugin(), FastAPI()
    plugin.attach_router(app)
    await plugin.init_state(Client(executor), None, None)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
        yield client


async def test_loaded_plan_is_attested_and_retired(http: httpx.AsyncClient, spec: ModelSpec) -> None:
    """Each response is the complete declared message."""
    plan = vector_plan(spec, 1.0, layer=1)
    loaded = LoadedPlan.parse((await http.put(plan_path(plan.revision), content=plan.to_bytes())).json())
    assert [(rank.rank, rank.digest) for rank in loaded.ranks] == [(0, plan.digest())]
    reported = (await http.get(ATTEST_ROUTE)).json()
    attested = Attestation.parse(reported)
    assert attested.body() == reported
    assert (attested.model, attested.points) == (describe_model(spec), list(POINTS))
    (core,) = attested.engines
    assert core.resident[plan.revision].digest == core.ranks[0].resident[plan.revision] == plan.digest()
    assert attested.special_tokens is not None
    assert attested.special_tokens.fault == "the engine has no tokenizer (--skip-tokenizer-init)"
    retired = (await http.delete(plan_path(plan.revision))).json()
    assert RetiredPlan.parse(retired) == RetiredPlan(revision=plan.revision, in_flight=0)
    assert not Attestation.parse((await http.get(ATTEST_ROUTE)).json()).revisions()


async def test_refusals_have_their_code_and_status(
    http: httpx.AsyncClient, spec: ModelSpec, executor: Executor
) -> None:
    """Damaged plan, wrong model, full table, wrong digest, unknown nonce: code in body and header."""

    async def refused(answer: httpx.Response) -> EngineCode:
        refusal = EngineRefusal.parse(answer.json())
        assert refusal.body() == answer.json()
        assert (answer.status_code, answer.headers[REFUSAL_HEADER]) == (refusal.code.status, refusal.code)
        return refusal.code

    plans = [vector_plan(spec, 1.0, layer=1, seed=seed) for seed in range(ROWS + 1)]
    other = vector_plan(ModelSpec(**describe_model(spec) | {"fingerprint": "0" * 64}), 1.0, layer=1)
    for plan, data, code in (
        (plans[0], b"no plan", EngineCode.INVALID_PLAN),
        (other, other.to_bytes(), EngineCode.INVALID_PLAN),
    ):
        assert await refused(await http.put(plan_path(plan.revision), content=data)) is code
    executor.spoil = {"digest": "0" * 64}
    answer = await http.put(plan_path(plans[0].revision), content=plans[0].to_bytes())
    assert await refused(answer) is EngineCode.DIGEST_MISMATCH
    executor.spoil = {}
    assert not Attestation.parse((await http.get(ATTEST_ROUTE)).json()).revisions()
    for plan in plans[: ROWS - 1]:
        assert (await http.put(plan_path(plan.revision), content=plan.to_bytes())).status_code == 200
    answer = await http.put(plan_path(plans[-1].revision), content=plans[-1].to_bytes())
    assert await refused(answer) is EngineCode.TABLE_FULL
    assert await refused(await http.get(receipt_path("0" * 32))) is EngineCode.UNKNOWN_NONCE
