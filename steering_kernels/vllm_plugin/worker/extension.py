"""The worker extension: methods that the engine core calls on every worker, and installation of the hooks."""

from __future__ import annotations

import base64
from typing import Any

from interpretops.engine_api import EngineCode, EngineRefusal, Rank, RankDigest, describe_model
from interpretops.errors import InterpretOpsError
from interpretops.plan import read_plan
from steering_kernels.vllm_plugin.worker.kv_blocks import count_slots
from steering_kernels.vllm_plugin.worker.runtime import make_runtime
from steering_kernels.vllm_plugin.wrapping import wrap_method


class SteeringWorker:
    """vLLM mixes this class into its worker class; the core calls its methods with `collective_rpc`."""

    def interpretops_load(self, plan: str) -> dict[str, Any]:
        """Load this rank's shard of a plan (base64). Returns the digest of its tables, or an error."""
        try:
            loaded = read_plan(base64.b64decode(plan))
            digest = self._interpretops_runtime.load(loaded)
        except InterpretOpsError as error:
            return EngineRefusal.of(EngineCode.of_error(error), str(error)).body()
        shard = self._interpretops_runtime.shard
        return RankDigest(
            rank=self._interpretops_rank, digest=digest, shard=shard.index, shards=shard.count
        ).body()

    def interpretops_unload(self, revision: str) -> None:
        """Free a revision's rows."""
        self._interpretops_runtime.unload(revision)

    def interpretops_attest(self) -> dict[str, Any]:
        """The contents of this rank's tables, and its model."""
        runtime = self._interpretops_runtime
        return Rank(
            rank=self._interpretops_rank,
            resident=runtime.resident(),
            edits=runtime.edits(),
            shard=runtime.shard.index,
            shards=runtime.shard.count,
            model=describe_model(runtime.spec),
            points=list(runtime.points),
        ).body()

    @property
    def _interpretops_runtime(self) -> Any:
        return self.model_runner.interpretops  # type: ignore[attr-defined]

    @property
    def _interpretops_rank(self) -> int:
        return int(self.rank)  # type: ignore[attr-defined]


def patch_worker() -> None:
    """Create the steering runtime of every worker as soon as its model is loaded."""
    from vllm.v1.worker.gpu_worker import Worker

    def load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        runner = self.model_runner
        runner.interpretops = make_runtime(
            runner.get_model(), self.vllm_config, self.device, lambda: count_slots(runner)
        )
        return result

    def compile_or_warm_up_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = self.model_runner.interpretops
        runtime.warming_up = True
        try:
            result = original(self, *args, **kwargs)
        finally:  # requests after a failed warm-up must name policies again
            runtime.warming_up = False
        runtime.end_warm_up(self.model_config.dtype)
        return result

    wrap_method(Worker, "load_model", load_model)
    wrap_method(Worker, "compile_or_warm_up_model", compile_or_warm_up_model)
