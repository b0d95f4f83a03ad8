"""A program that runs batches through one in-process vLLM engine, so that a test decides who shares a batch.

Reads a job from the file named by its first argument, writes what came out to the second. All requests of
a batch are added before the first step, which makes the schedule, and with it every shape, repeatable.
"""

import base64
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(job_path: str, result_path: str) -> None:
    """Run the job."""
    job = json.loads(Path(job_path).read_text())
    from vllm import LLM, SamplingParams

    preempted = count_preemptions()
    plugin = "interpretops" in os.environ.get("VLLM_PLUGINS", "")
    llm = LLM(**job["engine"])
    core = llm.llm_engine.engine_core.engine_core
    for plan in job.get("plans", []):
        answer = core.interpretops_load(base64.b64encode(Path(plan).read_bytes()).decode())
        if "error" in answer:
            raise SystemExit(answer["error"])
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
                extra_args={"interpretops_revision": item["revision"], "interpretops_nonce": nonce}
                if plugin
                else None,
            )
            for item, nonce in zip(batch, nonces, strict=True)
        ]
        # The next turn of a conversation: what was asked and answered in the batch before, and more.
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
    Path(result_path).write_text(json.dumps({"batches": batches, "preemptions": len(preempted)}))


def count_preemptions() -> list[str]:
    """A list that grows by the id of every request that the scheduler preempts."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[str] = []
    original = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        original(self, request, *args, **kwargs)

    Scheduler._preempt_request = preempt
    return preempted


def take_receipt(nonce: str) -> dict[str, Any] | None:
    """What the front end has collected for a request."""
    from steering_kernels.vllm_plugin.frontend.receipts import RECEIPTS

    return RECEIPTS.take(nonce)


if __name__ == "__main__":
    main(*sys.argv[1:])
