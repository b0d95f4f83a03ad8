"""Adapter for vLLM's V2 model runner (GPUs): the same four moments, under its names."""

from __future__ import annotations

from typing import Any

from steering_kernels.vllm_plugin.report import attach_reports
from steering_kernels.vllm_plugin.wrapping import wrap_method


def patch_runner_v2() -> None:
    """Patch `vllm.v1.worker.gpu.model_runner.GPUModelRunner`."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def finish_requests(original: Any, self: Any, scheduler_output: Any) -> Any:
        # The runner forgets preempted requests here too; we keep them, for where their gates fired.
        for request_id in scheduler_output.finished_req_ids:
            self.interpretops.untrack(request_id)
        return original(self, scheduler_output)

    def add_requests(original: Any, self: Any, scheduler_output: Any) -> Any:
        for new in scheduler_output.scheduled_new_reqs:
            self.interpretops.track(new.req_id, new.sampling_params.extra_args, new.num_computed_tokens)
        return original(self, scheduler_output)

    def execute_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        self.interpretops.clear_step()
        return original(self, *args, **kwargs)

    def prepare_inputs(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, *args, **kwargs)
        states, index = self.req_states, batch.idx_mapping_np
        self.interpretops.begin_step(
            list(batch.req_ids),
            batch.num_scheduled_tokens.tolist(),
            states.num_computed_tokens_np[index].tolist(),
            states.prompt_len.np[index].tolist(),
        )
        return batch

    def sample_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        return attach_reports(original(self, *args, **kwargs), self.interpretops)

    wrap_method(GPUModelRunner, "finish_requests", finish_requests)
    wrap_method(GPUModelRunner, "add_requests", add_requests)
    wrap_method(GPUModelRunner, "execute_model", execute_model)
    wrap_method(GPUModelRunner, "prepare_inputs", prepare_inputs)
    wrap_method(GPUModelRunner, "sample_tokens", sample_tokens)
