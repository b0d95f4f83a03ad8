"""Training checkpoints: parameters, optimizer state and step in one safetensors file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discovery.errors import DiscoveryError
from discovery.jobs.checksummed_file import REMEDY, load_tensors, save_tensors


def save_checkpoint(
    module: nn.Module, optimizer: torch.optim.Optimizer, path: Path, identity: Any, step: int
) -> None:
    """Write the state after ``step`` steps, whole or not at all."""
    tensors: dict[str, Tensor] = {f"edit.{name}": value for name, value in module.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
    save_tensors(path, identity, tensors, {"step": str(step)})


def restore_checkpoint(module: nn.Module, optimizer: torch.optim.Optimizer, path: Path, identity: Any) -> int:
    """Restore the state in ``path``; returns its step, or 0 if there is no file.

    Raises `DiscoveryError` for a damaged checkpoint or one of another training.
    """
    if not path.exists():
        return 0
    tensors, metadata = load_tensors(path, identity)
    state: dict[int, dict[str, Tensor]] = {}
    try:
        step = int(metadata["step"])
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"edit.{name}"])
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, part = name.split(".")
                state.setdefault(int(index), {})[part] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, ValueError, RuntimeError) as error:
        # The identity matches but the shapes do not: another version of this program wrote it.
        raise DiscoveryError(f"{path}: does not fit this training ({error}); {REMEDY}") from error
    return step


def learning_rate(highest: float, step: int, steps: int) -> float:
    """Warm-up over the first twentieth, then a half cosine down to a thirtieth of ``highest``."""
    warm = min(1.0, (step + 1) / max(steps * 0.05, 1))
    cosine = 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / max(steps, 1))))
    return highest * warm * (cosine * 29 / 30 + 1 / 30)
