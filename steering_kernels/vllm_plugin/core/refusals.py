"""Delivers the plugin's refusals to the gateway with an error code that it can act on.

vLLM turns any exception raised while the core accepts a request into a bare "Internal server error". So the
refusal is attached to the output by which vLLM tells the front end that the request has ended, and is kept
there by nonce until the response is written.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from typing import Any

from interpretops.engine_api import NONCE_KEY, REFUSAL_HEADER, EngineCode, EngineRefusal
from steering_kernels.vllm_plugin.core.registry import NotAdmittedError
from steering_kernels.vllm_plugin.request_args import RequestArgsError
from steering_kernels.vllm_plugin.wrapping import wrap_method

OUTPUT_KEY = "interpretops_refused"
CAPACITY = 16_384
_log = logging.getLogger("vllm.interpretops")


class Refusals:
    """The newest refusals, by nonce; the writer of each response takes its own."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._by_nonce: OrderedDict[str, tuple[EngineCode, str]] = OrderedDict()

    def record(self, nonce: str, code: EngineCode, message: str) -> None:
        """Store a refusal; drops the oldest beyond the capacity."""
        self._by_nonce[nonce] = code, message
        while len(self._by_nonce) > self._capacity:
            self._by_nonce.popitem(last=False)

    def take(self, nonce: str) -> tuple[EngineCode, str] | None:
        """Remove and return code and message for a nonce; None if its request was not refused."""
        return self._by_nonce.pop(nonce, None)


REFUSALS = Refusals()
"""The refusals of this front-end process."""


def take_refusal(output: Any) -> None:
    """In the front end: remove a refusal from an output of the core, and store it."""
    params = output.kv_transfer_params
    if params and OUTPUT_KEY in params:
        output.kv_transfer_params = None
        nonce, code, message = params[OUTPUT_KEY]
        REFUSALS.record(nonce, EngineCode.of(code), message)


def refusal_answer(code: EngineCode, message: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two ASGI messages of a refusal."""
    body = EngineRefusal.of(code, message).model_dump_json().encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (REFUSAL_HEADER.encode(), code.value.encode()),
    ]
    start = {"type": "http.response.start", "status": code.status, "headers": headers}
    return start, {"type": "http.response.body", "body": body}


def patch_refusals() -> None:
    """Patch the method of `EngineCoreProc` that handles requests which could not be accepted."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.engine.core import EngineCoreProc

    def handle_request_preproc_error(original: Any, self: Any, request: Any) -> Any:
        error = sys.exception()
        params = request.sampling_params
        nonce = None if params is None else (params.extra_args or {}).get(NONCE_KEY)
        if not isinstance(error, NotAdmittedError | RequestArgsError) or not isinstance(nonce, str):
            return original(self, request)
        _log.warning("request %s was refused: %s", request.request_id, error)
        output = EngineCoreOutput(
            request.request_id,
            [],
            finish_reason=FinishReason.ERROR,
            kv_transfer_params={OUTPUT_KEY: [nonce, error.code.value, str(error)]},
        )
        outputs = EngineCoreOutputs(finished_requests={request.request_id}, outputs=[output])
        self.output_queue.put_nowait((request.client_index, outputs))
        return None

    wrap_method(EngineCoreProc, "_handle_request_preproc_error", handle_request_preproc_error)
