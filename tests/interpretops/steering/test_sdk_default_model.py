"""The SDK on the default model: a policy acts, repeatably, and is gone afterwards; the SDK's page holds."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file

from interpretops import HookedModel, SteeringSession
from interpretops.plan import ModelSpec
from interpretops.policy import load_policy

pytestmark = pytest.mark.slow

PROMPT = "What is the capital of France?"
PASSES = 1e-3
"""Between float32 log-probabilities of the same tokens in differently shaped passes."""


@pytest.fixture(scope="module")
def model(default_model_dir: Path) -> HookedModel:
    return HookedModel(default_model_dir, dtype="float32")


@pytest.fixture(scope="module")
def policies(model: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three policies: one always acts, one behind a latched gate, one behind a gate that stays shut."""
    folder = tmp_path_factory.mktemp("policies")
    tokens = model.tokens(PROMPT)
    (stream,) = (x.numpy() for x in model.run_with_cache(tokens, ["10.resid_post"]).values())
    # Reads which token it is: the middle one of the question.
    fires_at = len(tokens) - 8
    probe = stream[fires_at] - stream[1:].mean(0)
    reads = stream @ probe
    assert reads[1:].argmax() + 1 == fires_at
    cut = float(sorted(reads[1:])[-1] + sorted(reads[1:])[-2]) / 2
    vector = (stream[3] - stream[-2]) / 4
    save_file({"probe": probe, "vector": vector}, folder / "vectors.safetensors")
    edits = """
interventions:
  - {type: steering_vector, selector: {layers: [12, 20]}, vector: {file: vectors.safetensors, tensor: vector},
     strength: 1.5, max_norm: 2000, gate: GATE}
  - {type: head_scale, selector: {layer: 14, heads: [0, 4, 8]}, scale: 0.0, gate: GATE}
"""
    gate = """
gates:
  met: {layer: 10, latched: true, max_norm: 2000,
        conditions: [{probe: {file: vectors.safetensors, tensor: probe}, threshold: CUT}]}
"""
    for name, text in {
        "always": edits.replace("GATE", "always"),
        "latched": gate.replace("CUT", str(cut)) + edits.replace("GATE", "met"),
        "shut": gate.replace("CUT", "1e6") + edits.replace("GATE", "met"),
    }.items():
        (folder / f"{name}.yaml").write_text(f"meta: {{id: {name}}}\n{text}")
    return folder


def test_policy_changes_the_answer_repeatably_and_leaves_no_trace(model: HookedModel, policies: Path) -> None:
    """Another answer under the policy, the same one each time, and afterwards the same bits as before."""
    tokens = model.tokens(PROMPT)
    before, answer = model.logprobs(tokens), model.generate(PROMPT, 10)
    assert "Paris" in answer
    with SteeringSession(model, load_policy(policies / "always.yaml"), artifacts=policies) as steer:
        steered = [steer.generate(PROMPT, 10) for _ in range(2)]
        receipt = steer.receipt
    assert steered[0] == steered[1] != answer
    # Two vectors leave the attention sink at position 0 alone, the head scale does not.
    assert receipt.edits_applied == 3 * receipt.tokens_evaluated - 2
    assert torch.equal(model.logprobs(tokens), before)
    assert model.generate(PROMPT, 10) == answer


@pytest.mark.parametrize("policy", ["always", "latched"])
def test_decoding_from_the_cache_agrees_with_one_pass(
    model: HookedModel, policies: Path, policy: str
) -> None:
    """The tokens of a steered answer have the log-probabilities that one pass over all of them gives."""
    prompt = model.tokens(PROMPT)
    with SteeringSession(model, policies / f"{policy}.yaml", artifacts=policies) as steer:
        cache, step, parts, answer = None, prompt, [], []
        for _ in range(12):
            out = model.network(torch.tensor([step]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits[0].log_softmax(-1))
            step = [int(parts[-1][-1].argmax())]
            answer += step
        receipt = steer.receipt
        whole = steer.logprobs((prompt + answer)[:-1], prompt_length=len(prompt))
        assert steer.receipt == receipt
    largest = (torch.cat(parts) - whole).abs().max()
    print(policy, float(largest))
    assert largest < PASSES
    if policy == "latched":
        assert receipt.gates_fired == 8 + len(answer) - 1


def test_gate_that_never_fires_leaves_every_bit(model: HookedModel, policies: Path) -> None:
    """Under a policy whose condition is never met the numbers are those of the model, bit for bit."""
    tokens = model.tokens(PROMPT)
    with SteeringSession(model, policies / "shut.yaml", artifacts=policies) as steer:
        assert torch.equal(steer.logprobs(tokens), model_logprobs(model, tokens))
        assert (steer.receipt.edits_applied, steer.receipt.gates_fired) == (0, 0)


def model_logprobs(model: HookedModel, tokens: list[int]) -> torch.Tensor:
    """Computed without the SDK, on a copy of the model that has never seen a session."""
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = network(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def test_steer_command_shows_both_answers_and_the_receipt(policies: Path) -> None:
    """`mechctl steer` prints the answers side by side and what the policy did."""
    done = mechctl("--policy", str(policies / "latched.yaml"), "--prompt", PROMPT, "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert "without" in done.stdout
    assert "with latched@" in done.stdout
    assert "Paris" in done.stdout
    assert re.search(r"receipt: \d+ tokens evaluated, [1-9]\d* edits applied, gates open [1-9]", done.stdout)


def test_steer_command_refuses_in_one_line(tmp_path: Path) -> None:
    """A policy that does not fit is a line on stderr and status 2, no traceback."""
    policy = tmp_path / "wrong.yaml"
    policy.write_text(
        "meta: {id: wrong}\n"
        "interventions: [{type: head_scale, selector: {layer: 3, heads: [9]}, scale: 0.5}]\n"
    )
    done = mechctl("--policy", str(policy), "--prompt", PROMPT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"wrong\.yaml.*heads\[0\] = 9, but", done.stderr)


def mechctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mechctl.main", "steer", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_page_of_the_sdk_holds(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    default_model_dir: Path,
) -> None:
    """docs/sdk.md, typed in from top to bottom, runs, and its policy changes the answer."""
    page = (repository / "docs" / "sdk.md").read_text(encoding="utf-8")
    (policy,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "pirate.yaml").write_text(policy)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(example, "docs/sdk.md", "exec"), names)  # noqa: S102 (our own page)
    plain, steered, receipt = capsys.readouterr().out.strip().rsplit("\n", 2)
    assert plain != steered
    assert receipt.startswith("SteeringReceipt(policy_id='pirate'")
    assert isinstance(names["model"].spec, ModelSpec)
    assert names["rows"].shape == (
        len(names["question"] + names["answer"]),
        names["model"].spec.vocab_size,
    )
