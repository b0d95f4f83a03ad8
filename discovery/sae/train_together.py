"""Data-parallel training of a dictionary: each worker has a part of every batch; all take the same step."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from discovery.errors import DiscoveryError
from discovery.jobs.workers import Team


def share_gradients(parameters: Sequence[nn.Parameter], team: Team) -> None:
    """Average gradients over the workers at the end of each backward pass, before clipping."""
    if team.count == 1:
        return
    ready = 0

    def accumulated(_parameter: Tensor) -> None:
        nonlocal ready
        ready += 1
        if ready == len(parameters):  # all at once: the order of gradients may differ between workers
            ready = 0
            team.mean([p.grad for p in parameters if p.grad is not None])

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]


def share_statistics(trainer: Any, team: Team) -> None:
    """Synchronise after a step: a feature last fired when it fired on any worker; thresholds are averaged."""
    team.least(trainer.n_forward_passes_since_fired)
    team.mean([trainer.sae.topk_threshold])


def check_alike(trainer: Any, team: Team) -> None:
    """Raise `DiscoveryError` unless all workers have bit-identical weights."""
    if team.count == 1:
        return
    digest = hashlib.sha256()
    for value in trainer.sae.state_dict().values():
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    if len(set(team.gather(digest.hexdigest()))) > 1:
        raise DiscoveryError(
            f"step {trainer.n_training_steps:,}: the workers' weights have diverged; "
            "use identical machines, or one worker"
        )
