"""The supported model families: the names of a decoder layer's submodules that locate the edit sites.

The names are the same in Hugging Face models and in vLLM.
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
# Gemma normalises the outputs of attention and MLP, so the norms' outputs are the contributions.
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
"""Keyed by the architecture in the model's config. Any other architecture is refused."""


def family_of(architecture: str) -> Family:
    """The family of an architecture; raises `ModelError` if its edit sites are unknown."""
    if architecture not in FAMILIES:
        raise ModelError(
            f"architecture = {architecture!r}, but edit sites are known for {sorted(FAMILIES)}; "
            "add the family to interpretops/model/family.py, with a test"
        )
    return FAMILIES[architecture]
