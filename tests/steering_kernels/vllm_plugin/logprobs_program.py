"""A program that asks in-process vLLM engines for log-probabilities at every token, steered and not.

Usage: logprobs_program.py FOLDER… Each folder holds a `job.json` that names a model folder, engine arguments,
plan files, how many tokens to tell of (-1: all), and requests (token ids, a revision, tokens to generate).
One engine after another, each in a child of its own, answers one. Into the folder it writes `log.txt` and
`result.npz`: of request i `ids_i` and `values_i` [T, K], a row after each token but the last, -1 and NaN
where there is none; `tokens_i`, what was generated; `receipt_i`;
`attested`, what the engine says it holds.
"""

import base64
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from interpretops.engine_api import EngineRefusal, read_loaded, seal

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(*folders: str) -> None:
    """Run each job in a fork: a process that ran one engine cannot run another."""
    for folder in folders:
        child = os.fork()
        if child == 0:
            log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            answer(Path(folder))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)


def answer(folder: Path) -> None:
    """Run the job of a folder, all its requests in one batch."""
    import numpy as np
    from vllm import LLM, SamplingParams

    from steering_kernels.vllm_plugin.frontend.receipts import RECEIPTS

    job = json.loads((folder / "job.json").read_text())
    ranks = job["engine"].get("tensor_parallel_size", 1)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = (
        "|".join(str(core) for core in range(ranks)) if ranks > 1 else "auto"
    )
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        max_logprobs=-1,
        logprobs_mode="raw_logprobs",
        enable_prefix_caching=False,
        **{"enforce_eager": True} | job["engine"],
    )
    core = llm.llm_engine.engine_core.engine_core
    for plan in job["plans"]:
        loaded = core.interpretops_load(base64.b64encode(Path(plan).read_bytes()).decode())
        if isinstance(answered := read_loaded(loaded), EngineRefusal):
            raise SystemExit(answered.message)
    nonces = [secrets.token_hex(16) for _ in job["requests"]]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=job["logprobs"],
            prompt_logprobs=job["logprobs"],
            extra_args=seal(request["revision"], nonce),
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
        receipt = RECEIPTS.take(nonces[index])
        result[f"receipt_{index}"] = np.array(json.dumps(receipt.body() if receipt else None))
    result["attested"] = np.array(json.dumps(core.interpretops_attest()))
    np.savez(folder / "result.npz", **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
