"""One engine in its own process, run batch by batch on command, so that a benchmark can interleave engines.

Reads JSON lines from standard input, and answers each on the file descriptor given as the first argument.
"""

import base64
import json
import os
import secrets
import sys
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(descriptor: int) -> None:
    """Serve commands until the input ends."""
    with os.fdopen(descriptor, "w", buffering=1) as answers:

        def answer(value: Any) -> None:
            answers.write(json.dumps(value) + "\n")

        setup = json.loads(sys.stdin.readline())
        from vllm import LLM, SamplingParams

        from interpretops.engine_api import NONCE_KEY, EngineRefusal, read_loaded, seal

        llm = LLM(**setup["engine"])
        plugin = "interpretops" in os.environ["VLLM_PLUGINS"].split(",")
        for plan in setup["plans"]:
            loaded = llm.llm_engine.engine_core.engine_core.interpretops_load(plan)
            if isinstance(answered := read_loaded(loaded), EngineRefusal):
                raise SystemExit(answered.message)
        answer("ready")
        for line in sys.stdin:
            job = json.loads(line)
            params = [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=job["max_tokens"],
                    ignore_eos=True,
                    detokenize=not setup["engine"]["skip_tokenizer_init"],
                    extra_args=seal(revision, secrets.token_hex(16)) if plugin else None,
                )
                for revision in job["revisions"]
            ]
            prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
            started = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            edits = 0
            if plugin:
                from steering_kernels.vllm_plugin.frontend.receipts import RECEIPTS

                for param in params:
                    receipt = RECEIPTS.take(param.extra_args[NONCE_KEY])
                    edits += receipt.edits_applied if receipt else 0
            answer(
                {
                    "seconds": seconds,
                    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                    "edits": edits,
                }
            )


def encode_plan(data: bytes) -> str:
    """A plan in the form that the worker accepts."""
    return base64.b64encode(data).decode()


if __name__ == "__main__":
    main(int(sys.argv[1]))
