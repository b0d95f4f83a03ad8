"""Activations of formatted prompts at every token, computed once and stored on disk: a gate's training data.

The store is content-addressed: a prompt's activations are found by its token ids, whatever run computed them.
So another choice of prompts computes only what is new, and an interrupted run can be resumed. float16 halves
the files; only attention sinks exceed its range, and they are never read.
"""

import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from discovery.data.sequences import batches
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.jobs.checksummed_file import load_json, save_json
from discovery.jobs.progress import meter
from discovery.jobs.whole_file import write_whole

LARGEST = float(np.finfo(np.float16).max)
SHARD_BATCHES = 8
"""Forward passes whose activations share a file; an interrupted run computes at most so many again."""

BOTH = "delete it and its .json, and run the same again"

Array = npt.NDArray[np.float16]


@dataclass(frozen=True)
class _Stored:
    """Where the activations of a prompt lie."""

    shard: Path
    first: int
    tokens: int


class PromptActivations:
    """The residual stream [T, L, D] after a few layers at every token of each prompt.

    An interrupted run can be resumed.
    """

    def __init__(
        self, model: FrozenModel, prompts: Sequence[tuple[int, ...]], layers: Sequence[int], store: Path
    ) -> None:
        """store  folder of all activations; other models, number formats and layers have their own folders"""
        self.prompts = prompts
        kind = str(next(model.network.parameters()).dtype).removeprefix("torch.")
        self._identity = [model.spec.fingerprint, kind, list(layers)]
        name = f"{model.spec.fingerprint[:12]}-{kind}-layers-{'-'.join(map(str, layers))}"
        self._folder = store / name
        self._stored: dict[str, _Stored] = {}
        self._open: dict[Path, Array] = {}
        self._sums: dict[Path, int] = {}
        self._keys = [_key(ids) for ids in prompts]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for record in sorted(self._folder.glob("*.json")):
                self._add(record)
            self._collect(model, layers)
        except OSError as error:
            lengths = {key: len(ids) for key, ids in zip(self._keys, prompts, strict=True)}
            missing = sum(length for key, length in lengths.items() if key not in self._stored)
            room = missing * len(layers) * model.spec.hidden_size * 2 / 2**20
            raise DiscoveryError(
                f"{self._folder}: cannot be written ({error.strerror or error}); make room for "
                f"{room:,.0f} MiB, then run the same command to resume"
            ) from error

    def _add(self, record: Path) -> None:
        """Take up a stored shard."""
        content = load_json(record, self._identity)
        shard, first = record.with_suffix(".npy"), 0
        self._sums[shard] = content["crc32"]
        for key, tokens in content["prompts"]:
            self._stored[key] = _Stored(shard, first, tokens)
            first += tokens

    def _collect(self, model: FrozenModel, layers: Sequence[int]) -> None:
        wanted = dict(zip(self._keys, self.prompts, strict=True))
        prompts = [list(ids) for key, ids in wanted.items() if key not in self._stored]
        everything = sum(map(len, wanted.values()))
        done = everything - sum(map(len, prompts))
        with meter("fit-gate: activations", everything, "tokens", done) as progress:
            for group in _grouped(list(batches(prompts)), SHARD_BATCHES):
                keys: list[tuple[str, int]] = []
                parts: list[Array] = []
                for batch in group:
                    padded, mask = model.pad([ids for _, ids in batch])
                    x = stacked(model, padded, mask, layers).clamp(-LARGEST, LARGEST)
                    for row, (_, ids) in enumerate(batch):
                        keys.append((_key(ids), len(ids)))
                        parts.append(x[row, : len(ids)].cpu().numpy().astype(np.float16))
                    progress.advance(sum(len(ids) for _, ids in batch))
                self._store(keys, np.concatenate(parts))

    def _store(self, keys: list[tuple[str, int]], values: Array) -> None:
        name = hashlib.sha256(repr(keys).encode()).hexdigest()[:32]
        shard = self._folder / f"{name}.npy"
        buffer = io.BytesIO()
        np.save(buffer, values)
        write_whole(shard, buffer.getvalue())
        # The record comes last: a shard without one does not count.
        content = {"prompts": keys, "crc32": zlib.crc32(values.tobytes())}
        save_json(shard.with_suffix(".json"), self._identity, content)
        self._add(shard.with_suffix(".json"))

    def of(self, place: int) -> Array:
        """[T, L, D] of one prompt."""
        at = self._stored[self._keys[place]]
        return self._values(at.shard)[at.first : at.first + at.tokens]

    def _values(self, shard: Path) -> Array:
        if shard not in self._open:
            try:
                values = np.load(shard, mmap_mode="r", allow_pickle=False)
                damaged = zlib.crc32(values.tobytes()) != self._sums[shard]
            except (OSError, ValueError) as error:
                raise DiscoveryError(f"{shard}: cannot be read ({error}); {BOTH}") from error
            if damaged:
                raise DiscoveryError(f"{shard}: was changed or damaged; {BOTH}")
            self._open[shard] = values
        return self._open[shard]

    def padded(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[B, T, L, D] float16 of these prompts, padded on the right, and the mask of real tokens [B, T]."""
        longest = max(len(self.prompts[place]) for place in places)
        x = np.zeros((len(places), longest, *self.of(places[0]).shape[1:]), np.float16)
        real = np.zeros((len(places), longest), np.bool_)
        for row, place in enumerate(places):
            length = len(self.prompts[place])
            x[row, :length] = self.of(place)
            real[row, :length] = True
        return torch.from_numpy(x), torch.from_numpy(real)


def _key(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()[:32]


def _grouped(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def stacked(model: FrozenModel, tokens: Tensor, mask: Tensor, layers: Sequence[int]) -> Tensor:
    """The residual stream [B, T, L, D] in float32 after some layers."""
    found = model.residuals(tokens, mask, layers)
    return torch.stack([found[layer].float() for layer in layers], dim=2)
