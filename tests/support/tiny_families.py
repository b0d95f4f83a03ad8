"""A tiny random model of every family, and a plan that acts at every point of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from interpretops.plan import (
    ALWAYS,
    POINTS,
    Array,
    Gate,
    HeadScaling,
    ModelSpec,
    Plan,
    Site,
    SiteEdits,
    Units,
)

VOCAB = 128
LAYERS = 3
PROMPT = [7, 91, 23, 5, 64, 110, 38, 2, 77, 12, 99, 41, 56, 120, 18, 33, 84, 70, 9, 101]
"""Distinct tokens, more than the sliding window of the families that have one."""
FIRES_AT = 12
"""Position in `PROMPT` at which the plan's latched gate fires first."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# A separate head dimension where the family allows one: all heads together are wider than the stream.
_WIDE: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_SLIDING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", _WIDE),
    "MistralForCausalLM": ("MistralConfig", _WIDE | {"sliding_window": 8}),
    "Qwen2ForCausalLM": ("Qwen2Config", {"num_key_value_heads": 1}),
    "Qwen3ForCausalLM": ("Qwen3Config", _WIDE),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        _WIDE
        | _SLIDING
        | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0, "tie_word_embeddings": True},
    ),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _WIDE | _SLIDING | {"query_pre_attn_scalar": 32}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {"use_parallel_residual": True}),
}
"""Config class and its settings, by architecture."""


def save_family(architecture: str, folder: Path, **changes: Any) -> Path:
    """Write a model of the family, with weights large enough for tokens to differ in their activations."""
    name, settings = CONFIGS[architecture]
    torch.manual_seed(11)
    network = getattr(transformers, architecture)(getattr(transformers, name)(**_SIZES | settings | changes))
    with torch.no_grad():
        for label, parameter in network.named_parameters():
            if "embed" in label:
                parameter.copy_(torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
            elif "norm" not in label:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            else:  # Gemma's norms multiply by 1 + weight
                parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder / architecture)
    return folder / architecture


def gate_plan(
    spec: ModelSpec,
    gate_stream: Array,
    *,
    sites: Iterable[Site] | None = None,
    latched: bool = True,
    fires: bool = True,
) -> Plan:
    """Edits at all points of layer 1 and after the last layer, half of them behind a gate.

    gate_stream  [T, D] the residual stream after layer 0 on `PROMPT`, unedited
    sites        of all these edits those to keep
    """
    rng = np.random.default_rng(5)
    edits = {Site(1, point): _site_edits(spec, Site(1, point), rng) for point in POINTS}
    last = Site(LAYERS - 1, "resid_post")
    edits[last] = _site_edits(spec, last, rng)
    if sites is not None:
        edits = {site: edits[site] for site in sites}
    return Plan(
        "families", "test", spec, edits, (ALWAYS, _gate(gate_stream, latched, fires), *_phase_gates())
    )


def _gate(stream: Array, latched: bool, fires: bool) -> Gate:
    """A gate that fires at `FIRES_AT` and nowhere else in the prompt, or nowhere at all."""
    # Reads 1 at that token and 0 at the others.
    read = np.linalg.pinv(stream[: len(PROMPT)].astype(np.float64))[:, FIRES_AT]
    cut = 0.5 if fires else 1e6
    return Gate(
        Site(0, "resid_post"),
        np.stack([read, -read]).astype(np.float32),
        np.zeros(2, np.float32),
        np.array([cut, 1e6], np.float32),
        latched=latched,
    )


def _phase_gates() -> tuple[Gate, Gate]:
    none, empty = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    return Gate(None, none, empty, empty, phase="prefill"), Gate(None, none, empty, empty, phase="decode")


def _site_edits(spec: ModelSpec, site: Site, rng: np.random.Generator) -> SiteEdits:
    """Eight units, two of each kind, one of each pair behind the gate; at attn_z also a scaled head."""
    width, read_width, count = spec.width(site.point), spec.read_width(site.point), 8
    kind = np.arange(count) % 4  # feature_scale, feature_clamp, steering_vector, direction_ablation
    read = rng.normal(size=(count, read_width)) / np.sqrt(read_width)
    write = rng.normal(size=(count, width)) / np.sqrt(width)
    if site.point != "attn_proj":  # it writes another activation than it reads
        write = np.where((kind == 3)[:, None], read, write)
    infinite = np.full(count, np.inf)
    values = {
        "read": np.where((kind == 2)[:, None], 0.0, read),
        "write": write,
        "bias": np.where(kind <= 1, 0.3, 0.0),
        "threshold": np.where(kind <= 1, 0.1, -infinite),
        "gain": np.where(kind == 0, -0.7, np.where(kind == 3, -0.8, 0.0)),
        "offset": np.where(kind == 2, 1.5, 0.0),
        "low": np.where(kind == 1, -0.2, -infinite),
        "high": np.where(kind == 1, 0.2, infinite),
        "max_norm": np.where(np.arange(count) == 2, 1e-3, infinite),
    }
    indices: dict[str, Any] = {"gate": np.array([0, 0, 0, 0, 1, 1, 2, 3]), "topk": np.full(count, -1)}
    units = Units(
        **{name: value.astype(np.float32) for name, value in values.items()},
        **{name: value.astype(np.int32) for name, value in indices.items()},
    )
    scale = None
    if site.point == "attn_z":
        delta = np.zeros((2, spec.num_heads, spec.head_dim), np.float32)
        delta[0, 0], delta[1, -1] = -0.5, 1.0
        scale = HeadScaling(delta.reshape(2, -1), np.array([0, 1], np.int32))
    return SiteEdits(units, scale)
