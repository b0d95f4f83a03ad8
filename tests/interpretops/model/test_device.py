"""Devices by name: what is not here, or is no device, is one line with the remedy."""

import pytest
import torch

from interpretops.errors import ModelError
from interpretops.model.device import pick_device
from interpretops.settings import load_settings


def test_auto_is_the_default_and_always_works() -> None:
    """Without any settings a device is found, whatever the machine has."""
    settings = load_settings(None, environ={})
    assert settings.model.device == "auto"
    assert pick_device(settings.model.device).type in ("cpu", "cuda")


def test_gpu_that_is_not_there_says_what_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` on a machine without one, and a number too high."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError, match=r"device = 'cuda', but torch finds no GPU here.*write device: auto"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="finds 2 GPUs") as error:
        pick_device("cuda:7")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["mps", "gpu", "cuda:x"])
def test_what_is_no_device_is_refused(name: str) -> None:
    """Other names are refused by name."""
    with pytest.raises(ModelError, match=f"device = '{name}', but must be auto, cpu"):
        pick_device(name)
