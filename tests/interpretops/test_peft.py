"""Adapters that PEFT itself wrote: a `lora_gate` policy does what PEFT does, and its heads can be chosen."""

from pathlib import Path

import pytest
import torch
from tiny_families import PROMPT, save_family

from interpretops import HookedModel, SteeringSession
from interpretops.adapter import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from interpretops.dictionary.manifest import (
    AdapterManifest,
    ModelReference,
    TrainingRecord,
    WeightsReference,
    sha256_of,
    write_manifest,
)
from interpretops.model_spec import read_model_spec
from interpretops.plan import Site
from interpretops.policy import load_policy

POLICY = """
meta: {{id: calm, target_class: calm}}
interventions:
  - type: lora_gate
    selector: {{block: attn{heads}}}
    alpha: {alpha}
"""


def write_peft_adapter(
    network: torch.nn.Module, module: str, folder: Path, artifacts: Path
) -> torch.nn.Module:
    """A PEFT adapter with random A and B on one module, saved by PEFT; returns PEFT's own model."""
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[module], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(network, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    spec = read_model_spec(folder)
    target = artifacts / spec.name / "adapters" / "calm"
    wrapped.save_pretrained(target)
    manifest = AdapterManifest(
        id="calm",
        target_class="calm",
        model=ModelReference(name=spec.name, fingerprint=spec.fingerprint),
        weights=WeightsReference(file=WEIGHTS_NAME, sha256=sha256_of(target / WEIGHTS_NAME)),
        license=None,
        training=TrainingRecord(),
    )
    write_manifest(target, manifest)
    assert (target / CONFIG_NAME).exists()
    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "module"),
    [("LlamaForCausalLM", "o_proj"), ("Gemma2ForCausalLM", "o_proj"), ("GPTNeoXForCausalLM", "dense")],
)
def test_lora_gate_gives_the_logits_of_peft(architecture: str, module: str, tmp_path: Path) -> None:
    """Alpha 1 is PEFT's own model; alpha 0 is the untouched one; no head named is all heads."""
    folder = save_family(architecture, tmp_path)
    model = HookedModel(model_name=str(folder), dtype="float32", device="cpu")
    untouched = model.logprobs(PROMPT)
    artifacts = tmp_path / "artifacts"

    def steered(alpha: float, heads: str = "") -> torch.Tensor:
        path = tmp_path / "calm.yaml"
        path.write_text(POLICY.format(alpha=alpha, heads=heads))
        with SteeringSession(model, load_policy(path), artifacts=artifacts) as session:
            return session.logprobs(PROMPT)

    import transformers

    fresh = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    wrapped = write_peft_adapter(fresh, module, folder, artifacts).eval()
    with torch.no_grad():
        expected = wrapped(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert set(open_adapter(artifacts / architecture / "adapters" / "calm").sites) == {
        Site(layer, "attn_proj") for layer in range(3)
    }
    assert not torch.allclose(expected, untouched, atol=1e-2)
    assert torch.allclose(steered(1.0), expected, atol=1e-4)
    assert torch.equal(steered(0.0), untouched)
    everyone = range(model.spec.num_heads)
    assert torch.allclose(steered(1.0, f", heads: [{', '.join(map(str, everyone))}]"), expected, atol=1e-4)
    assert not torch.allclose(steered(1.0, ", heads: [1]"), expected, atol=1e-2)
