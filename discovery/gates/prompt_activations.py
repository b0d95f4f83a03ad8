"""Activations of many formatted prompts, computed once and stored on disk: a gate's training data.

float16 halves the file; only attention sinks exceed its range, and they are never read.
"""

import hashlib
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from discovery.data.sequences import batches
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.jobs.checksummed_file import REMEDY, load_json_if_same_run, save_json
from discovery.jobs.progress import meter

LARGEST = float(np.finfo(np.float16).max)


class PromptActivations:
    """The residual stream [T, L, D] after a few layers at every token of each prompt.

    An interrupted run can be resumed.
    """

    def __init__(
        self, model: FrozenModel, prompts: Sequence[tuple[int, ...]], layers: Sequence[int], folder: Path
    ) -> None:
        self.prompts = prompts
        self._first = np.cumsum([0, *(len(ids) for ids in prompts)])
        shape = (int(self._first[-1]), len(layers), model.spec.hidden_size)
        identity = hashlib.sha256(repr((prompts, layers, model.spec.fingerprint)).encode()).hexdigest()
        data, record = folder / "activations.npy", folder / "activations.json"
        folder.mkdir(parents=True, exist_ok=True)
        done = 0
        self._sums: list[int] = []
        """Checksum of each finished batch."""
        try:
            if (kept := load_json_if_same_run(record, identity)) is not None:
                done, self._sums = len(kept), kept
                self._values = _reopen(data, shape)
            else:
                self._values = np.lib.format.open_memmap(data, "w+", np.float16, shape)  # type: ignore[no-untyped-call]
            self._collect(model, layers, done, record, identity)
        except OSError as error:
            raise DiscoveryError(
                f"{data}: cannot be written ({error.strerror or error}); make room for "
                f"{math.prod(shape) * 2 / 2**20:,.0f} MiB, then run the same command to resume"
            ) from error

    def _collect(
        self, model: FrozenModel, layers: Sequence[int], done: int, record: Path, identity: str
    ) -> None:
        groups = list(batches([list(ids) for ids in self.prompts]))
        if self._sums != [self._sum(group) for group in groups[:done]]:
            raise DiscoveryError(f"{record}: its activations were changed or damaged; {REMEDY}")
        tokens = [sum(len(ids) for _, ids in group) for group in groups]
        with meter("fit-gate: activations", sum(tokens), "tokens", sum(tokens[:done])) as progress:
            for number, group in enumerate(groups[done:], start=done + 1):
                padded, mask = model.pad([ids for _, ids in group])
                x = stacked(model, padded, mask, layers).clamp(-LARGEST, LARGEST)
                for row, (place, ids) in enumerate(group):
                    self._values[self._first[place] : self._first[place + 1]] = (
                        x[row, : len(ids)].cpu().numpy()
                    )
                progress.advance(tokens[number - 1])
                self._sums.append(self._sum(group))
                if number % 10 == 0 or number == len(groups):
                    self._flush()
                    save_json(record, identity, self._sums)

    def _sum(self, group: Sequence[tuple[int, Sequence[int]]]) -> int:
        """crc32 of a stored batch."""
        total = 0
        for place, _ in group:
            total = zlib.crc32(np.ascontiguousarray(self.of(place)).tobytes(), total)
        return total

    def _flush(self) -> None:
        assert isinstance(self._values, np.memmap)
        self._values.flush()

    def of(self, place: int) -> npt.NDArray[np.float16]:
        """[T, L, D] of one prompt."""
        return np.asarray(self._values[self._first[place] : self._first[place + 1]])

    def padded(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[B, T, L, D] float16 of these prompts, padded on the right, and the mask of real tokens [B, T]."""
        longest = max(len(self.prompts[place]) for place in places)
        x = np.zeros((len(places), longest, *self._values.shape[1:]), np.float16)
        real = np.zeros((len(places), longest), np.bool_)
        for row, place in enumerate(places):
            length = len(self.prompts[place])
            x[row, :length] = self.of(place)
            real[row, :length] = True
        return torch.from_numpy(x), torch.from_numpy(real)


def _reopen(data: Path, shape: tuple[int, ...]) -> Any:
    try:
        values = np.load(data, mmap_mode="r+", allow_pickle=False)
    except (ValueError, FileNotFoundError) as error:
        raise DiscoveryError(f"{data}: is damaged ({error}); delete it and its .json") from error
    if values.shape != shape or values.dtype != np.float16:
        raise DiscoveryError(f"{data}: does not have the shape in its record; delete it and its .json")
    return values


def stacked(model: FrozenModel, tokens: Tensor, mask: Tensor, layers: Sequence[int]) -> Tensor:
    """The residual stream [B, T, L, D] in float32 after some layers."""
    found = model.residuals(tokens, mask, layers)
    return torch.stack([found[layer].float() for layer in layers], dim=2)
