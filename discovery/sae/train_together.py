"""One dictionary trained by several workers: each has a part of every batch, and all make the same step."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from discovery.errors import DiscoveryError
from discovery.jobs.workers import Team


def share_gradients(parameters: Sequence[nn.Parameter], team: Team) -> None:
    """From now on each backward pass ends with the gradients' means over the workers; clipping follows."""
    if team.count == 1:
        return
    ready = 0

    def accumulated(_parameter: Tensor) -> None:
        nonlocal ready
        ready += 1
        if ready == len(parameters):  # all at once: in which order they come need not be the same everywhere
            ready = 0
            team.mean([p.grad for p in parameters if p.grad is not None])

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]


def share_statistics(trainer: Any, team: Team) -> None:
    """After a step: a feature is as dead as where it fired last; the threshold is the mean one."""
    team.least(trainer.n_forward_passes_since_fired)
    team.mean([trainer.sae.topk_threshold])


def check_alike(trainer: Any, team: Team) -> None:
    """Raise `DiscoveryError` unless all workers have come to the same weights, to the bit."""
    if team.count == 1:
        return
    digest = hashlib.sha256()
    for value in trainer.sae.state_dict().values():
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    if len(set(team.gather(digest.hexdigest()))) > 1:
        raise DiscoveryError(
            f"step {trainer.n_training_steps:,}: the workers' weights are no longer the same; "
            "use workers whose machines compute alike, or one"
        )
