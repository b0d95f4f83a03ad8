"""A job spread over worker processes: torch's launcher starts them, and gloo connects them.

`mechctl` starts its own command once per worker (`start_workers`), and each of these joins the others
(`joined`). `torchrun` starts the same workers on several hosts.
"""

import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from discovery.errors import DiscoveryError
from interpretops.errors import InterpretOpsError

STOPPING_S = 300
"""How long workers that were asked to stop may take to reach the next safe point."""


@dataclass(frozen=True)
class Team:
    """The workers of a job, seen from one of them. All must make the same calls in the same order."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this worker prints and writes for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the workers, bit-identical on each."""
        if self.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.count
            for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def least(self, tensor: Tensor) -> None:
        """Replace a tensor by its element-wise minimum over the workers."""
        if self.count > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """If the block fails on one worker, it fails on all: the first raises the error, the others exit."""
        own: InterpretOpsError | None = None
        try:
            yield
        except InterpretOpsError as error:
            own = error
        reasons = [reason for reason in self.gather(None if own is None else str(own)) if reason is not None]
        if reasons and not self.first:
            raise SystemExit(2)
        if own is not None:
            raise own
        if reasons:
            raise DiscoveryError(reasons[0])


ALONE = Team()


@contextmanager
def joined(workers: int) -> Iterator[Team]:
    """The team of this process: the workers that the launcher started together, or this process alone."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    # If a worker dies, the launcher ends the others, so no shorter limit is needed here.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        if dist.get_world_size() != workers:
            raise DiscoveryError(f"--workers = {workers}, but the launcher started {dist.get_world_size()}")
        yield Team(dist.get_rank(), workers)
    finally:
        dist.destroy_process_group()


def start_workers(workers: int, command: Sequence[str]) -> bool:
    """Run a command once per worker on this host; False if this process is a worker or the only one.

    If workers fail, the first has printed the error, and this process exits with its status.
    """
    if workers < 1:
        raise DiscoveryError(f"--workers = {workers}, but must be 1 or more")
    if workers == 1 or dist.is_torchelastic_launched():
        return False
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # the first worker prints errors
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        virtual_local_rank=torch.cuda.is_available(),
        shutdown_timeout=STOPPING_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "mechctl.main", *command)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if 2 not in codes:  # no worker has printed an error
            raise DiscoveryError(f"a worker died ({error.get_first_failure()[1].message})") from error
        raise SystemExit(2) from error
    except SignalException as error:
        raise SystemExit(2) from error
    return True
