"""Adapter for vLLM's V1 model runner: lays out our batch whenever vLLM lays out its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steering_kernels.vllm_plugin.worker.kv_blocks import cache_block_size, new_blocks
from steering_kernels.vllm_plugin.worker.report import attach_reports
from steering_kernels.vllm_plugin.wrapping import wrap_method


def patch_runner_v1() -> None:
    """Patch `vllm.v1.worker.gpu_model_runner.GPUModelRunner`, which the CPU runner inherits from."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def update_states(original: Any, self: Any, scheduler_output: Any) -> Any:
        runtime = self.interpretops
        for request_id in scheduler_output.finished_req_ids:
            runtime.untrack(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            runtime.track(new.req_id, new.sampling_params.extra_args, new.num_computed_tokens)
        runtime.end_step()
        if runtime.keeps_readings:
            size = cache_block_size(self)
            runtime.empty_blocks(new_blocks(scheduler_output, size), size)
        return original(self, scheduler_output)

    def prepare_inputs(original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        # By now the batch has been updated, condensed and reordered: its order is the tokens' order.
        batch = self.input_batch
        count = batch.num_reqs
        self.interpretops.begin_step(
            batch.req_ids[:count],
            num_scheduled_tokens.tolist(),
            batch.num_computed_tokens_cpu[:count].tolist(),
            batch.num_prompt_tokens[:count].tolist(),
            lambda place, position: _slots(batch.block_table[0], place, position),
        )
        return original(self, scheduler_output, num_scheduled_tokens)

    def dummy_run(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        self.interpretops.clear_step()
        return original(self, *args, **kwargs)

    def sample_tokens(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        reports = self.interpretops.reports()
        return attach_reports(original(self, *args, **kwargs), reports)

    wrap_method(GPUModelRunner, "_update_states", update_states)
    wrap_method(GPUModelRunner, "_prepare_inputs", prepare_inputs)
    wrap_method(GPUModelRunner, "_dummy_run", dummy_run)
    wrap_method(GPUModelRunner, "sample_tokens", sample_tokens)


def _slots(table: Any, place: npt.NDArray[np.int64], position: npt.NDArray[np.int64]) -> Tensor:
    """KV-cache slots of tokens at batch indices and positions (as `BlockTable.compute_slot_mapping`)."""
    blocks = table.block_table.np[place, position // table.block_size].astype(np.int64)
    return torch.from_numpy(blocks * table.block_size + position % table.block_size)
