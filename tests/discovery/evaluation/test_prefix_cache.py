"""The shipped guard answers alike whether or not the engine finds the prompt in its prefix cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from interpretops.compile import compile_policy
from interpretops.model.spec import read_model_spec
from interpretops.policy import load_policy

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONTEXT = (
    "You are the assistant of a small public library. You help visitors find books, explain words and ideas "
    "in plain language, answer everyday questions briefly and politely, and say so when you do not know."
)
NEXT_TURN = "Thank you. Please say the same once more in a single short sentence."
EACH = 12
OUTPUT_TOKENS = 24


def test_numbers_of_a_card_do_not_depend_on_the_prefix_cache(
    run_engine: Callable[..., Any], default_model_dir: Path, repository: Path
) -> None:
    """24 prompts behind one system prompt: a cold cache, a warm one and none give the same gates and answers.

    So does the next turn of each, which finds the first in the cache. In float32, where the order of sums
    does not decide between two tokens.
    """
    policy = load_policy(repository / "policies" / "jailbreak.yaml")
    spec = read_model_spec(default_model_dir)
    plan = compile_policy(policy, model=spec, artifacts=repository / "sae_artifacts")
    tokenizer = AutoTokenizer.from_pretrained(str(default_model_dir))
    lists = yaml.safe_load((repository / "discovery" / "prompts" / "contrast.yaml").read_text())
    asked = [text for name in ("harmful", "benign") for text in lists[name][:EACH]]
    batch = []
    for text in asked:
        turns = [{"role": "system", "content": CONTEXT}, {"role": "user", "content": text}]
        formatted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(formatted, add_special_tokens=False).input_ids
        batch.append({"prompt": ids, "revision": plan.revision, "max_tokens": OUTPUT_TOKENS})
    more = [{"role": "user", "content": NEXT_TURN}]
    asked_next = tokenizer.apply_chat_template(more, tokenize=False, add_generation_prompt=True)
    # Without the system turn that the template adds of its own.
    following = "<|im_end|>\n" + asked_next[asked_next.index("<|im_start|>user") :]
    ids = tokenizer(following, add_special_tokens=False).input_ids
    turn = [
        {"prompt": ids, "continues": True, "revision": plan.revision, "max_tokens": OUTPUT_TOKENS}
        for _ in batch
    ]
    ways: dict[str, list[dict[str, Any]]] = {}
    cached = run_engine([batch, batch, turn], plans=[plan], dtype="float32", enable_prefix_caching=True)
    ways["cold"], ways["warm"], ways["next, warm"] = cached["batches"]
    uncached = run_engine([batch, turn], plans=[plan], dtype="float32", enable_prefix_caching=False)
    ways["none"], ways["next, none"] = uncached["batches"]
    hits = {name: [answer["cached"] or 0 for answer in answers] for name, answers in ways.items()}
    assert sum(hits["none"]) == sum(hits["next, none"]) == 0
    assert min(hits["warm"] + hits["next, warm"]) >= 32, "the cache was not used, so nothing was tested"
    fired = {name: [a["receipt"]["gates_fired"] for a in answers] for name, answers in ways.items()}
    assert fired["cold"] == fired["warm"] == fired["none"]
    assert fired["next, warm"] == fired["next, none"]
    assert {count > 0 for count in fired["cold"]} == {True, False}
    texts = {name: [answer["tokens"] for answer in answers] for name, answers in ways.items()}
    assert texts["cold"] == texts["warm"] == texts["none"]
    assert texts["next, warm"] == texts["next, none"]
