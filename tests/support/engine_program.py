"""A program that runs batches through one in-process vLLM engine, so that a test decides who shares a batch.

It connects to the address that is its argument and reads JSON from there: first what engine to make, then
jobs, and answers each with what came out, until the other side closes. All requests of a batch are added
before the first step, which makes the schedule, and with it every shape, repeatable. A job finds neither
plans nor cached blocks of the one before it.
"""

import base64
import json
import os
import secrets
import sys
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from interpretops.engine_api import EngineRefusal, RetiredPlan, read_loaded, seal

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(address: str) -> None:
    """Create the engine and serve jobs."""
    with Client(address, "AF_UNIX") as orders:
        options = json.loads(orders.recv_bytes())
        from vllm import LLM

        preempted = count_preemptions()
        llm = LLM(**options)
        while True:
            try:
                job = json.loads(orders.recv_bytes())
            except EOFError:
                return
            preempted.clear()
            assert llm.reset_prefix_cache()
            result = {"batches": run(llm, job), "preemptions": len(preempted)}
            orders.send_bytes(json.dumps(result).encode())


def run(llm: Any, job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The answers to each batch of a job, under its plans."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    plugin = "interpretops" in os.environ.get("VLLM_PLUGINS", "")
    core = llm.llm_engine.engine_core.engine_core
    loaded = []
    for plan in job["plans"]:
        answer = core.interpretops_load(base64.b64encode(Path(plan).read_bytes()).decode())
        held = read_loaded(answer)
        if isinstance(held, EngineRefusal):
            raise SystemExit(held.message)
        loaded.append(held.revision)
    batches: list[list[dict[str, Any]]] = []
    asked: list[list[int]] = []
    for batch in job["batches"]:
        nonces = [secrets.token_hex(16) for _ in batch]
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=item["max_tokens"],
                ignore_eos=True,
                logprobs=1,
                extra_args=seal(item["revision"], nonce) if plugin else None,
                structured_outputs=StructuredOutputsParams(regex=item["regex"]) if "regex" in item else None,
            )
            for item, nonce in zip(batch, nonces, strict=True)
        ]
        # The next turn of a conversation: the previous prompt and answer, and more.
        before = [
            asked[place] + batches[-1][place]["tokens"] if item.get("continues") else []
            for place, item in enumerate(batch)
        ]
        asked = [[*said, *item["prompt"]] for said, item in zip(before, batch, strict=True)]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
        batches.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        next(iter(step.values())).logprob for step in output.outputs[0].logprobs or []
                    ],
                    "cached": output.num_cached_tokens,
                    "receipt": take_receipt(nonce) if plugin else None,
                }
                for output, nonce in zip(outputs, nonces, strict=True)
            ]
        )
    for revision in loaded:
        assert RetiredPlan.parse(core.interpretops_retire(revision)).in_flight == 0
    return batches


def count_preemptions() -> list[str]:
    """A list that collects the id of every preempted request."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[str] = []
    original = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        original(self, request, *args, **kwargs)

    Scheduler._preempt_request = preempt
    return preempted


def take_receipt(nonce: str) -> dict[str, Any] | None:
    """The front end's receipt of a request."""
    from steering_kernels.vllm_plugin.frontend.receipts import RECEIPTS

    receipt = RECEIPTS.take(nonce)
    return None if receipt is None else receipt.body()


if __name__ == "__main__":
    main(*sys.argv[1:])
