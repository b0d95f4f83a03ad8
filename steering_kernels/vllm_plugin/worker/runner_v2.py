"""Adapter for vLLM's V2 model runner (GPUs): the same hooks as for V1, and support for whole-model graphs.

A decode step may be replayed from a graph of the whole model, which contains the edits but no gates. A step
with a gate that must read activations runs piecewise instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steering_kernels.vllm_plugin.worker.kv_blocks import cache_block_size, new_blocks
from steering_kernels.vllm_plugin.worker.report import attach_reports
from steering_kernels.vllm_plugin.wrapping import wrap_method


def patch_runner_v2() -> None:
    """Patch `vllm.v1.worker.gpu.model_runner.GPUModelRunner`."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def finish_requests(original: Any, self: Any, scheduler_output: Any) -> Any:
        # The runner also drops preempted requests here; we keep them, because of where their gates fired.
        for request_id in scheduler_output.finished_req_ids:
            self.interpretops.untrack(request_id)
        return original(self, scheduler_output)

    def add_requests(original: Any, self: Any, scheduler_output: Any) -> Any:
        for new in scheduler_output.scheduled_new_reqs:
            self.interpretops.track(new.req_id, new.sampling_params.extra_args, new.num_computed_tokens)
        return original(self, scheduler_output)

    def execute_model(
        original: Any, self: Any, scheduler_output: Any, *args: Any, dummy_run: bool = False, **kwargs: Any
    ) -> Any:
        runtime = self.interpretops
        if dummy_run:
            runtime.clear_step()
        else:
            runtime.end_step()
            if runtime.keeps_readings:
                size = cache_block_size(self)
                runtime.empty_blocks(new_blocks(scheduler_output, size), size)
        return original(self, scheduler_output, *args, dummy_run=dummy_run, **kwargs)

    def gather_batch_req_state(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        state, uniform_tokens = original(self, *args, **kwargs)
        if state is None:  # a dummy pass
            return state, uniform_tokens
        index = state.idx_mapping_np
        in_prompt = self.req_states.num_computed_tokens_np[index] < self.req_states.prompt_len.np[index]
        if self.interpretops.may_replay(state.req_ids, in_prompt.tolist()):
            return state, uniform_tokens
        return state, None  # not reported as a uniform decode step, so no whole-model graph is used

    def prepare_inputs(
        original: Any, self: Any, scheduled: Any, state: Any, graph: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm.config import CUDAGraphMode

        batch = original(self, scheduled, state, graph, *args, **kwargs)
        states, index = self.req_states, batch.idx_mapping_np
        self.interpretops.begin_step(
            list(batch.req_ids),
            batch.num_scheduled_tokens.tolist(),
            states.num_computed_tokens_np[index].tolist(),
            states.prompt_len.np[index].tolist(),
            lambda place, position: _slots(self.block_tables, index[place], position),
            replayed=graph.cg_mode == CUDAGraphMode.FULL,
        )
        return batch

    def capture(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        self.interpretops.clear_step()
        self.interpretops.hooks.capturing = self.interpretops.replays
        try:
            return original(self, *args, **kwargs)
        finally:
            self.interpretops.hooks.capturing = False

    def sample_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        reports = self.interpretops.reports()
        return attach_reports(original(self, *args, **kwargs), reports)

    wrap_method(GPUModelRunner, "finish_requests", finish_requests)
    wrap_method(GPUModelRunner, "add_requests", add_requests)
    wrap_method(GPUModelRunner, "execute_model", execute_model)
    wrap_method(GPUModelRunner, "gather_batch_req_state", gather_batch_req_state)
    wrap_method(GPUModelRunner, "prepare_inputs", prepare_inputs)
    wrap_method(GPUModelRunner, "sample_tokens", sample_tokens)
    wrap_method(GPUModelRunner, "capture_model", capture)
    wrap_method(GPUModelRunner, "profile_cudagraph_memory", capture)


def _slots(tables: Any, request: npt.NDArray[np.int64], position: npt.NDArray[np.int64]) -> Tensor:
    """KV-cache slots of tokens of requests at positions (as `_compute_slot_mappings_kernel`)."""
    table, size = tables.block_tables[0].gpu, tables.block_sizes[0]
    rows, places = (torch.from_numpy(np.asarray(x, np.int64)).to(table.device) for x in (request, position))
    slots: Tensor = table[rows, places // size].long() * size + places % size
    return slots
