"""The shipped guard's gate, which reads whole prompts, under the V2 runner with its graphs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from interpretops.compile import compile_policy
from interpretops.model.spec import read_model_spec
from interpretops.policy import load_policy

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.slow]

CONTEXT = (
    "You are the assistant of a small public library. You help visitors find books, explain words and ideas "
    "in plain language, answer everyday questions briefly and politely, and say so when you do not know."
)
EACH = 12
OUTPUT_TOKENS = 24


def test_gate_gives_one_verdict_with_and_without_cache_and_chunks(
    run_engine: Callable[..., Any],
    default_model_dir: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 prompts behind one system prompt: a cold cache, a warm one, and a prompt cut into chunks."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    spec = read_model_spec(default_model_dir)
    policy = load_policy(repository / "policies" / "jailbreak.yaml")
    plan = compile_policy(policy, model=spec, artifacts=repository / "sae_artifacts")
    tokenizer = AutoTokenizer.from_pretrained(str(default_model_dir))
    lists = yaml.safe_load((repository / "discovery" / "prompts" / "contrast.yaml").read_text())
    batch, plain = [], []
    for text in [text for name in ("harmful", "benign") for text in lists[name][:EACH]]:
        turns = [{"role": "system", "content": CONTEXT}, {"role": "user", "content": text}]
        formatted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(formatted, add_special_tokens=False).input_ids
        batch.append({"prompt": ids, "revision": plan.revision, "max_tokens": OUTPUT_TOKENS})
        plain.append(batch[-1] | {"revision": "none"})
    graphs: dict[str, Any] = {
        "enforce_eager": False,
        "cudagraph_capture_sizes": [1, 8, 16],
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 2 * 2**30,
        "block_size": 16,
    }
    cold, warm, none = run_engine([batch, batch, plain], plans=[plan], **graphs)["batches"]
    (chunked,) = run_engine(
        [batch], plans=[plan], **graphs, enable_prefix_caching=False, max_num_batched_tokens=48
    )["batches"]
    assert min(answer["cached"] for answer in warm) >= 32, "the cache was not used, so nothing was tested"
    fired = [[answer["receipt"]["gates_fired"] for answer in way] for way in (cold, warm, chunked)]
    assert fired[0] == fired[1] == fired[2]
    # From the prompt's last token on the gate stands open, at every token but the answer's last.
    assert set(fired[0]) == {0, OUTPUT_TOKENS}
    assert sum(map(bool, fired[0][:EACH])) > EACH // 2
    for answer, other in zip(cold, none, strict=True):
        receipt = answer["receipt"]
        assert bool(receipt["edits_applied"]) == bool(receipt["gates_fired"])
        assert receipt["gates_fired"] or answer["tokens"] == other["tokens"]
