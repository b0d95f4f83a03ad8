"""The front-end process: refuses requests that name no policy, and collects receipts from outputs."""

from __future__ import annotations

from typing import Any

from steering_kernels.vllm_plugin.engine_config import prepare
from steering_kernels.vllm_plugin.frontend.receipts import collect, mark_ended
from steering_kernels.vllm_plugin.request_args import RequestArgs, RequestArgsError
from steering_kernels.vllm_plugin.wrapping import wrap_method


def patch_frontend() -> None:
    """Patch engine configuration, input processing and output processing."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    def create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        prepare(config)
        return config

    def process_inputs(
        original: Any, self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # The engine core checks again; checking here gives the caller a clear 400.
        try:
            RequestArgs.read(getattr(params, "extra_args", None))
        except RequestArgsError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        return original(self, request_id, prompt, params, *args, **kwargs)

    def process_outputs(original: Any, self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        reported = collect(outputs)
        result = original(self, outputs, *args, **kwargs)
        mark_ended(reported, self.request_states)
        return result

    wrap_method(EngineArgs, "create_engine_config", create_engine_config)
    wrap_method(InputProcessor, "process_inputs", process_inputs)
    wrap_method(OutputProcessor, "process_outputs", process_outputs)
