"""The model families whose edit sites are known, by the names of a decoder layer's submodules.

The names hold for Hugging Face models and for vLLM's, which keep them.
"""

from dataclasses import dataclass

from interpretops.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Names of a decoder layer's submodules, relative to the layer."""

    attention_projection: str
    """Its input is ``attn_z``, all heads side by side."""
    attention_out: str
    """Its output is what attention adds to the residual stream."""
    mlp_out: str
    """Its output is what the MLP adds to the residual stream."""


_LLAMA = Family("self_attn.o_proj", "self_attn.o_proj", "mlp")
# Gemma normalises what attention and MLP add, so that the norms' outputs are the contributions.
_GEMMA = Family("self_attn.o_proj", "post_attention_layernorm", "post_feedforward_layernorm")
_NEOX = Family("attention.dense", "attention.dense", "mlp")

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "GPTNeoXForCausalLM": _NEOX,
}
"""By the architecture that the model's config names. An architecture that is not here is refused."""


def family_of(architecture: str) -> Family:
    """The family of an architecture; raises `ModelError` for one whose sites are not known."""
    if architecture not in FAMILIES:
        raise ModelError(
            f"architecture = {architecture!r}, but edit sites are known for {sorted(FAMILIES)}; "
            "add the family to interpretops/model/family.py, with a test"
        )
    return FAMILIES[architecture]
