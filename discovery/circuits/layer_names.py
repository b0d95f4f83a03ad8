"""The names in a decoder layer of each model family that the graph of heads and MLPs needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerNames:
    """Names of a layer's submodules and of their arguments."""

    attention: str = "self_attn"
    past: str = "past_key_values"
    """Attention's argument for the keys and values of earlier tokens."""
    fused: str | None = None
    """The projection that computes query, key and value of each head together; None if there are three."""
    before_mlp: str = "post_attention_layernorm"
    after_attention: str | None = None
    """The norm of attention's output."""
    after_mlp: str | None = None
    final_norm: str = "norm"
    """The model's final norm, before the logits."""


_LLAMA = LayerNames()
_GEMMA = LayerNames(
    before_mlp="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_NEOX = LayerNames(
    attention="attention", past="layer_past", fused="query_key_value", final_norm="final_layer_norm"
)
LAYER_NAMES: dict[str, LayerNames] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "GPTNeoXForCausalLM": _NEOX,
}
"""Keyed by the architecture in the model's config."""
