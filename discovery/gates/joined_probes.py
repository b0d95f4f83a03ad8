"""One gate of several probes: those of this training, and those of files trained before."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.gates.learned_gate import LearnedGate
from interpretops.artifacts.vectors import read_attention_probe
from interpretops.errors import PolicyError
from interpretops.plan import ModelSpec
from steering_kernels.ops import MEMORY_COLUMNS

Numbers = dict[int, dict[str, Tensor]]
"""By layer, query [H, D], read [H, D] and bias [H] for plain activations."""


def read_numbers(path: Path, spec: ModelSpec, layers: Sequence[int]) -> Numbers:
    """Read a probe file. Raises `DiscoveryError` if it is for another model or other layers."""
    try:
        probe = read_attention_probe(path, spec.hidden_size)
    except PolicyError as error:
        raise DiscoveryError(f"{path}: {error}; name the probe.safetensors of an adapter") from error
    if probe.model_fingerprint != spec.fingerprint:
        raise DiscoveryError(f"{path}: was trained on another model than {spec.name}; leave it out")
    if list(probe.layers) != list(layers):
        raise DiscoveryError(
            f"{path}: reads at layers {list(probe.layers)}, but the gate at {list(layers)}; "
            "give --gate-layers"
        )
    return {
        layer: {name: torch.from_numpy(array) for name, array in arrays.items() if name != "max_norm"}
        for layer, arrays in probe.layers.items()
    }


def check_heads(trained: int, joined: Sequence[Numbers]) -> None:
    """Raise `DiscoveryError` if there are more heads than an engine keeps, including joined probes."""
    heads = trained + sum(len(arrays["bias"]) for numbers in joined for arrays in numbers.values())
    if heads > MEMORY_COLUMNS // 2:
        raise DiscoveryError(
            f"{trained} heads to train and {heads - trained} of joined probes, but an engine keeps "
            f"{MEMORY_COLUMNS // 2}; lower --probes or --heads, or join fewer"
        )


@torch.no_grad()
def mean_of(probes: Sequence[LearnedGate], joined: Sequence[Numbers] = ()) -> LearnedGate:
    """One gate with all heads of the probes, whose reading is the mean of theirs."""
    first, layers = probes[0], probes[0].settings.layers
    parts = [*(probe.numbers() for probe in probes), *joined]
    if len(parts) == 1:
        return first
    together = {
        name: torch.stack([torch.cat([part[layer][name] for part in parts]) for layer in layers])
        for name in ("query", "read", "bias")
    }
    settings = replace(first.settings, heads=together["bias"].shape[1])
    gate = LearnedGate(settings, torch.zeros_like(first.mean), torch.ones_like(first.spread), first.bounds)
    gate.query.copy_(together["query"])
    gate.value.copy_(together["read"] / len(parts))
    gate.bias.copy_(together["bias"] / len(parts))
    return gate
