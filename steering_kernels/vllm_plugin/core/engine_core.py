"""The engine core: admits requests of resident revisions, salts their blocks, loads and retires plans."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from interpretops.engine_api import (
    EngineCode,
    EngineRefusal,
    LoadedPlan,
    Rank,
    RankDigest,
    RankGroup,
    RetiredPlan,
    read_rank_loaded,
)
from interpretops.errors import PlanError
from interpretops.plan import Plan, read_plan
from interpretops.plan.reach import depends_on_prompt_end
from interpretops.plan.shard import Shard
from steering_kernels.vllm_plugin.core.refusal_stop import is_constrained, stop_refused
from steering_kernels.vllm_plugin.core.registry import CacheUse, NotAdmittedError, Registry
from steering_kernels.vllm_plugin.engine_config import EngineOptions
from steering_kernels.vllm_plugin.request_args import RequestArgs, compose_cache_salt
from steering_kernels.vllm_plugin.worker.report import move_to_outputs, refusal_gates
from steering_kernels.vllm_plugin.wrapping import wrap_method

PROMPT_BLOCKS_ONLY = "interpretops_prompt_blocks_only"
"""Key that `admit` sets in a request's ``extra_args``, overwriting any given value."""


def admit(registry: Registry, request: Any) -> None:
    """Check an `EngineCoreRequest` and salt it before its blocks are hashed. Raises if it may not run."""
    if request.sampling_params is None:
        raise NotAdmittedError(EngineCode.NOT_GENERATING, "only generating requests can run under a policy")
    args = RequestArgs.read(request.sampling_params.extra_args)
    use = registry.admit(request.request_id, args)
    if not use.reads:
        request.sampling_params.skip_reading_prefix_cache = True
    request.sampling_params.extra_args[PROMPT_BLOCKS_ONLY] = not use.keeps_answers
    request.cache_salt = compose_cache_salt(args.revision, request.cache_salt)


def cache_use(plan: Plan) -> CacheUse:
    """How requests of a plan may use the prefix cache without changing their answers."""
    latched = any(gate.latched and gate.scope == "token" for gate in plan.gates)
    return CacheUse(reads=not latched, keeps_answers=not depends_on_prompt_end(plan))


def cacheable_tokens(request: Any, tokens: int) -> int:
    """How many of a request's first ``tokens`` may enter the prefix cache.

    Under a revision that depends on the end of the prompt, only the tokens before it. From the last prompt
    token on, keys and values are those of an answer, which differ from those of the same text in a later
    prompt.
    """
    params = request.sampling_params
    if params is not None and (params.extra_args or {}).get(PROMPT_BLOCKS_ONLY, False):
        return int(min(tokens, request.num_prompt_tokens - 1))
    return tokens


def load(core: Any, plan: str) -> dict[str, Any]:
    """Load a plan (base64) on every rank of this core and admit its requests. Returns errors."""
    data = base64.b64decode(plan)
    revision = hashlib.sha256(data).hexdigest()
    count = core.vllm_config.parallel_config.tensor_parallel_size
    try:
        parsed = read_plan(data)
        digests = [Shard(index, count).of_plan(parsed).digest() for index in range(count)]
    except PlanError as error:
        return EngineRefusal.of(EngineCode.of_error(error), str(error)).body()
    answers = core.model_executor.collective_rpc("interpretops_load", args=(plan,))
    held = [
        _check_held(read_rank_loaded(answer), digest, count)
        for answer, digest in zip(answers, digests, strict=True)
    ]
    refusals = [rank for rank in held if isinstance(rank, EngineRefusal)]
    if refusals:
        core.model_executor.collective_rpc("interpretops_unload", args=(revision,))
        return refusals[0].body()
    texts = {index: gate.refusal for index, gate in enumerate(parsed.gates) if gate.refusal is not None}
    core.interpretops.add(revision, parsed.digest(), cache_use(parsed), texts)
    ranks = [rank for rank in held if isinstance(rank, RankDigest)]
    return LoadedPlan(revision=revision, ranks=ranks).body()


def _check_held(rank: RankDigest | EngineRefusal, digest: str, shards: int) -> RankDigest | EngineRefusal:
    """The rank if it holds its shard of the plan unchanged; otherwise a refusal."""
    if isinstance(rank, RankDigest) and (rank.digest, rank.shards) != (digest, shards):
        return EngineRefusal.of(
            EngineCode.DIGEST_MISMATCH, f"rank {rank.rank} has another digest than the plan"
        )
    return rank


def retire(core: Any, revision: str) -> dict[str, Any]:
    """Admit no more requests of a revision, and free its rows once none is in progress."""
    in_flight = core.interpretops.retire(revision)
    free_if_idle(core, revision)
    return RetiredPlan(revision=revision, in_flight=in_flight).body()


def free_if_idle(core: Any, revision: str) -> None:
    """Free the rows of a retired revision on every rank, unless requests still use them."""
    if core.interpretops.drop_if_idle(revision):
        core.model_executor.collective_rpc("interpretops_unload", args=(revision,))


def attest(core: Any) -> dict[str, Any]:
    """The revisions this core admits, and the contents of each rank's tables."""
    return RankGroup(
        ranks=[Rank.parse(rank) for rank in core.model_executor.collective_rpc("interpretops_attest")],
        resident=core.interpretops.resident(),
        pass_through=core.interpretops.pass_through,
    ).body()


def _registry(core: Any) -> Registry:
    """The core's registry. `setdefault` is atomic: input thread and main loop may race to create it."""
    options = EngineOptions.read(core.vllm_config.additional_config)
    registry: Registry = vars(core).setdefault(
        "_interpretops_registry", Registry(pass_through=options.pass_through)
    )
    return registry


def _idle(core: Any) -> list[str]:
    """Retired revisions whose last request has ended; freed after the step."""
    idle: list[str] = vars(core).setdefault("_interpretops_idle", [])
    return idle


def patch_core() -> None:
    """Patch `EngineCore`, `Scheduler` and the prefix cache. vLLM looks up utility methods on the core."""
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    def preprocess_add_request(original: Any, self: Any, request: Any) -> Any:
        self.scheduler.interpretops_core = self
        admit(self.interpretops, request)
        try:
            return original(self, request)
        except BaseException:
            self.interpretops.release(request.request_id)
            raise

    def free_request(original: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, request, *args, **kwargs)
        core = self.interpretops_core
        idle = core.interpretops.release(request.request_id)
        if idle is not None:
            core.interpretops_idle.append(idle)
        return result

    def update_from_output(original: Any, self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        self.interpretops_refusals = refusal_gates(model_runner_output)
        outputs = original(self, scheduler_output, model_runner_output)
        move_to_outputs(model_runner_output, outputs)
        return outputs

    def update_request_with_output(
        original: Any, self: Any, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        tokens, stopped = original(self, request, new_token_ids, *args, **kwargs)
        gate = self.interpretops_refusals.get(request.request_id)
        if gate is None or not is_constrained(request):
            return tokens, stopped
        return stop_refused(request, self.interpretops_core.interpretops, gate, tokens), True

    def post_step(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        while self.interpretops_idle:
            free_if_idle(self, self.interpretops_idle.pop())
        return result

    def cache_blocks(original: Any, self: Any, request: Any, num_computed_tokens: int) -> None:
        original(self, request, cacheable_tokens(request, num_computed_tokens))

    # vLLM loads plugins inside EngineCore.__init__, too late to wrap it: state is created on first use.
    EngineCore.interpretops = property(_registry)
    EngineCore.interpretops_idle = property(_idle)
    EngineCore.interpretops_load = load
    EngineCore.interpretops_retire = retire
    EngineCore.interpretops_attest = attest
    wrap_method(EngineCore, "preprocess_add_request", preprocess_add_request)
    wrap_method(EngineCore, "post_step", post_step)
    wrap_method(Scheduler, "_free_request", free_request)
    wrap_method(Scheduler, "update_from_output", update_from_output)
    wrap_method(Scheduler, "_update_request_with_output", update_request_with_output)
    wrap_method(KVCacheCoordinator, "cache_blocks", cache_blocks)
