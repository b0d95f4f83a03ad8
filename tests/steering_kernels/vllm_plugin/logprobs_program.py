"""A program that asks one in-process vLLM engine for log-probabilities at every token, steered and not.

Usage: logprobs_program.py JOB RESULT. The job names a model folder, engine arguments, plan files, how many
tokens to tell of (-1: all), and requests (token ids, a revision, tokens to generate). The result is an npz
file: of request i `ids_i` and `values_i` [T, K], a row after each token but the last, -1 and NaN where there
is none; `tokens_i`, what was generated; `receipt_i`.
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
    """Run the job, all its requests in one batch."""
    import numpy as np
    from vllm import LLM, SamplingParams

    from steering_kernels.vllm_plugin.receipts import RECEIPTS

    job = json.loads(Path(job_path).read_text())
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_logprobs=-1,
        logprobs_mode="raw_logprobs",
        enable_prefix_caching=False,
        **job["engine"],
    )
    core = llm.llm_engine.engine_core.engine_core
    for plan in job["plans"]:
        answer = core.interpretops_load(base64.b64encode(Path(plan).read_bytes()).decode())
        if "error" in answer:
            raise SystemExit(answer["error"])
    nonces = [secrets.token_hex(16) for _ in job["requests"]]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=job["logprobs"],
            prompt_logprobs=job["logprobs"],
            extra_args={"interpretops_revision": request["revision"], "interpretops_nonce": nonce},
        )
        for request, nonce in zip(job["requests"], nonces, strict=True)
    ]
    prompts = [{"prompt_token_ids": request["prompt"]} for request in job["requests"]]
    result: dict[str, Any] = {}
    for index, output in enumerate(llm.generate(prompts, params, use_tqdm=False)):
        rows = output.prompt_logprobs[1:] + output.outputs[0].logprobs
        ids = np.full((len(rows), max(map(len, rows))), -1)
        values = np.full(ids.shape, np.nan, np.float32)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = list(row)
            values[place, : len(row)] = [entry.logprob for entry in row.values()]
        result |= {f"ids_{index}": ids, f"values_{index}": values}
        result[f"tokens_{index}"] = np.array(output.outputs[0].token_ids)
        result[f"receipt_{index}"] = np.array(json.dumps(RECEIPTS.take(nonces[index])))
    np.savez(result_path, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
