"""How each model family lays out a decoder layer, as far as its graph of heads and MLPs needs to know."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerNames:
    """Names of a layer's submodules, and of what they are called with."""

    attention: str = "self_attn"
    past: str = "past_key_values"
    """The argument by which attention is given keys and values of earlier tokens."""
    fused: str | None = None
    """One projection that gives query, key and value of each head, side by side; None: three of them."""
    before_mlp: str = "post_attention_layernorm"
    after_attention: str | None = None
    """The norm of what attention adds to the stream."""
    after_mlp: str | None = None
    final_norm: str = "norm"
    """The model's last norm, before its logits."""


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
"""By the architecture that the model's config names."""
