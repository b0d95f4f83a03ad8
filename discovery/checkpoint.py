"""Checkpoints of a training: parameters, optimizer state and step in one safetensors file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from discovery.errors import DiscoveryError
from interpretops.atomic_file import write_atomically


def save_checkpoint(
    module: nn.Module, optimizer: torch.optim.Optimizer, path: Path, identity: Any, step: int
) -> None:
    """Write the state after ``step`` steps, whole or not at all."""
    tensors = {f"edit.{name}": value.detach().clone() for name, value in module.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value.detach().clone() for name, value in state.items()}
    data = save_safetensors(tensors, {"step": str(step), "identity": json.dumps(identity, sort_keys=True)})
    try:
        write_atomically(path, data)
    except OSError as error:
        raise DiscoveryError(
            f"{path}: cannot be written ({error.strerror or error}); make room, the same command goes on"
        ) from error


def restore_checkpoint(module: nn.Module, optimizer: torch.optim.Optimizer, path: Path, identity: Any) -> int:
    """Take up the state in ``path``; gives its step, 0 when there is none.

    Raises `DiscoveryError` for a checkpoint of another training or a damaged one.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DiscoveryError(f"{path}: is damaged ({error}); remove it to begin anew") from error
    if json.loads(metadata["identity"]) != json.loads(json.dumps(identity)):
        raise DiscoveryError(f"{path}: is of another training; remove it or give another --work")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[f"edit.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, part = name.split(".")
            state.setdefault(int(index), {})[part] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


def learning_rate(highest: float, step: int, steps: int) -> float:
    """Warm-up over the first twentieth, then a half cosine down to a thirtieth of ``highest``."""
    warm = min(1.0, (step + 1) / max(steps * 0.05, 1))
    cosine = 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / max(steps, 1))))
    return highest * warm * (cosine * 29 / 30 + 1 / 30)
