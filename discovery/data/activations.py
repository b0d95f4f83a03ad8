"""Reads a trace folder: shuffled batches for training, held-out sequences for measuring."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from discovery.data.sources import KINDS, Kind, Source, read_text
from discovery.data.trace import HELD_OUT, read_trace_record
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel, hook_name

PARTS: dict[Kind, str] = {"prompts": "chat", "text": "text", "openings": "own_text"}
"""The name of each kind of held-out sequence in the metrics."""


class TraceReader:
    """One layer of a finished trace, in memory in its stored dtype. Every shard's sha256 is checked."""

    def __init__(self, folder: Path, layer: int) -> None:
        self.folder, self.layer = folder, layer
        self.record: dict[str, Any] = read_trace_record(folder)
        name = hook_name(layer)
        if name not in self.record["max_norm"]:
            raise DiscoveryError(
                f"{folder}: layer = {layer} was not traced; it has {sorted(self.record['max_norm'])}"
            )
        if not self.record.get("complete"):
            raise DiscoveryError(
                f"{folder}: the trace is not finished; run the same mechctl trace again to finish it"
            )
        self.max_norm = float(self.record["max_norm"][name])
        parts = [_read(folder / entry["file"], entry["sha256"])[name] for entry in self.record["shards"]]
        self.activations: Tensor = torch.cat(parts)


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences: ids and mask [B, T], and the part that each row belongs to."""

    tokens: Tensor
    mask: Tensor
    parts: tuple[str, ...]


def text_to_measure(model: FrozenModel, text: Source, context: int, most_tokens: int) -> HeldOut:
    """About ``most_tokens`` of a text as sequences to measure on, as a separate part."""
    ids = model.text_ids(read_text(text))[:most_tokens]
    cuts = (ids[i : i + context] for i in range(0, len(ids), context))
    pieces = [piece for piece in cuts if len(piece) > 8]
    if not pieces:
        raise DiscoveryError(f"{text.path}: holds fewer than 9 tokens; name a longer text")
    tokens, mask = model.pad(pieces)
    return HeldOut(tokens.cpu(), mask.cpu(), (text.name or text.path.stem,) * len(pieces))


def read_held_out(folder: Path, most_tokens: int) -> HeldOut:
    """About ``most_tokens`` of a trace's held-out sequences."""
    record = read_trace_record(folder)
    if "held_out" not in record:
        raise DiscoveryError(f"{folder}: holds no held-out sequences; trace with --held-out above 0")
    tensors = _read(folder / HELD_OUT, record["held_out"]["sha256"])
    mask = tensors["mask"].long()
    rows = int((mask.sum(1).cumsum(0) <= most_tokens).sum().clamp(min=1))
    kinds = tensors["kind"][:rows].tolist() if "kind" in tensors else [0] * rows
    return HeldOut(tensors["tokens"][:rows].long(), mask[:rows], tuple(PARTS[KINDS[kind]] for kind in kinds))


def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DiscoveryError(
                f"{path}: differs from what the trace recorded; trace again into another folder"
            )
        return load_safetensors(data)
    except (OSError, SafetensorError) as error:
        raise DiscoveryError(f"{path}: cannot be read ({error}); trace again into another folder") from error


def shuffled_batches(activations: Tensor, size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless float32 batches [size, D], newly permuted in each pass; batch ``start`` comes first.

    Batch n depends only on the seed and n, so a resumed run sees the same batches.
    """
    per_pass = len(activations) // size
    if per_pass < 1:
        raise DiscoveryError(f"batch = {size}, but the trace holds only {len(activations)} tokens")
    number = start
    order = None
    while True:
        epoch, place = divmod(number, per_pass)
        if order is None or place == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(activations), generator=generator)
        yield activations[order[place * size : (place + 1) * size]].float()
        number += 1
