"""Picks the device that a setting names, or says in one line what to do if this machine has none."""

from typing import TYPE_CHECKING

from interpretops.errors import ModelError

if TYPE_CHECKING:
    import torch


def pick_device(device: "str | torch.device") -> "torch.device":
    """The torch device. `auto` is a GPU if there is one, else the CPU. Raises `ModelError`."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device = {device!r}, but must be auto, cpu, cuda or cuda:<n>") from error
    if found.type not in ("cpu", "cuda"):
        raise ModelError(f"device = {str(device)!r}, but must be auto, cpu, cuda or cuda:<n>")
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        count = torch.cuda.device_count()
        built = "" if torch.version.cuda else " (this torch build supports only CPUs)"
        raise ModelError(
            f"device = {str(device)!r}, but torch finds {count or 'no'} GPU{'s' * (count > 1)} here{built}; "
            "write device: auto, which uses a GPU if there is one, or cpu"
        )
    return found
