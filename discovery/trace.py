"""Tracing: prompts and text through the model, residual activations to sharded safetensors, resumable.

A trace folder holds ``trace.json`` (the run record and the list of finished shards), the shards
(``shard-00000.safetensors``, …, each with ``blocks.<l>.hook_resid_post`` [T, D], ``tokens`` [T],
``position`` [T] and ``sequence`` [T]), and ``held_out.safetensors``: the token ids of sequences that were
left out, for measuring on.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel, hook_name, norm_bound
from discovery.progress import Meter, meter
from discovery.run_record import run_record, write_json
from discovery.sources import DataList, Source, read_prompts, read_text
from interpretops.atomic_file import write_atomically

RECORD = "trace.json"
HELD_OUT = "held_out.safetensors"
BATCH_TOKENS = 4096
PILOT_SEQUENCES = 32
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TraceSettings:
    """What decides the content of a trace, apart from data and model."""

    layers: tuple[int, ...]
    context: int = 256
    """Most tokens of a sequence; text is cut into pieces of this length."""
    answer_tokens: int = 0
    """Length of the model's own greedy answer that follows each prompt; 0: none."""
    shard_sequences: int = 256
    held_out_share: float = 0.03
    dtype: Literal["float16", "bfloat16"] = "bfloat16"
    sink_ratio: float = 8.0
    """A token whose norm exceeds this many medians is an attention sink and is left out."""
    seed: int = 0

    def check(self) -> None:
        """Raise `DiscoveryError` for a value that makes no sense."""
        for name, good in (
            ("layers", len(self.layers) > 0 and len(set(self.layers)) == len(self.layers)),
            ("context", self.context >= 8),
            ("answer_tokens", 0 <= self.answer_tokens < self.context),
            ("shard_sequences", self.shard_sequences >= 1),
            ("held_out_share", 0 <= self.held_out_share < 1),
            ("dtype", self.dtype in DTYPES),
            ("sink_ratio", self.sink_ratio > 1),
        ):
            if not good:
                raise DiscoveryError(
                    f"{name} = {getattr(self, name)!r} is out of range; see mechctl trace --help"
                )


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one sequence; ``wants_answer`` where the model's own answer is to follow."""

    ids: tuple[int, ...]
    wants_answer: bool


def trace(model: FrozenModel, data: DataList, settings: TraceSettings, folder: Path) -> dict[str, Any]:
    """Trace into ``folder``, or go on where an earlier run of the same stopped. Returns the record."""
    settings.check()
    model.check_layers(settings.layers)
    sequences = build_sequences(model, [s for group in data.groups.values() for s in group], settings)
    random.Random(settings.seed).shuffle(sequences)  # noqa: S311 (an order, no secret)
    held_out = sequences[: round(len(sequences) * settings.held_out_share)]
    kept = sequences[len(held_out) :]
    shards = [kept[i : i + settings.shard_sequences] for i in range(0, len(kept), settings.shard_sequences)]
    record = _begin(model, data, settings, folder, kept)
    _write_held_out(model, held_out, settings, folder, record)
    total = sum(len(s.ids) + s.wants_answer * settings.answer_tokens for s in kept)
    done = sum(entry["read"] for entry in record["shards"])
    with meter("trace", total, "tokens", done) as progress:
        for index in range(len(record["shards"]), len(shards)):
            entry = _trace_shard(model, shards[index], settings, record["max_norm"], folder, index, progress)
            record["shards"].append(entry)
            record["complete"] = len(record["shards"]) == len(shards)
            write_json(folder / RECORD, record)
    return record


def build_sequences(
    model: FrozenModel, sources: Iterable[Source], settings: TraceSettings
) -> list[TokenSequence]:
    """All token sequences of the sources, in their order."""
    found: list[TokenSequence] = []
    room = settings.context - settings.answer_tokens
    for source in sources:
        if source.kind == "prompts":
            for prompt in read_prompts(source):
                ids = model.chat_ids(prompt, room)
                found.append(TokenSequence(tuple(ids), settings.answer_tokens > 0))
        else:
            ids = model.text_ids(read_text(source))
            pieces = (ids[i : i + settings.context] for i in range(0, len(ids), settings.context))
            found.extend(TokenSequence(tuple(piece), False) for piece in pieces if len(piece) >= 8)
    if not found:
        raise DiscoveryError("the data hold no sequence of 8 tokens or more; add prompts or text")
    return found


def _begin(
    model: FrozenModel, data: DataList, settings: TraceSettings, folder: Path, kept: Sequence[TokenSequence]
) -> dict[str, Any]:
    """The record to go on with: the folder's own if it is of the same trace, else a new one."""
    plain = json.loads(json.dumps(asdict(settings)))
    record = run_record("trace", settings.seed, plain, data.record())
    record["model"] = asdict(model.spec)
    record["sequences"] = hashlib.sha256(repr([s.ids for s in kept]).encode()).hexdigest()
    path = folder / RECORD
    if path.exists():
        earlier = read_trace_record(folder)
        for key in ("model", "settings", "sequences"):
            if earlier.get(key) != record[key]:
                changed = earlier.get(key), record[key]
                raise DiscoveryError(
                    f"{path}: {key} is of another trace ({_difference(*changed)}); name another --out"
                )
        return earlier
    record["max_norm"] = _norm_bounds(model, kept, settings)
    record["shards"] = []
    record["complete"] = False
    try:
        write_json(path, record)
    except OSError as error:
        raise DiscoveryError(
            f"{folder}: cannot be written to ({error.strerror}); name another --out"
        ) from error
    return record


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        return ", ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in keys)
    return "other data"


def _norm_bounds(
    model: FrozenModel, sequences: Sequence[TokenSequence], settings: TraceSettings
) -> dict[str, float]:
    norms: dict[int, list[Tensor]] = {layer: [] for layer in settings.layers}
    for batch in batches([list(s.ids) for s in sequences[:PILOT_SEQUENCES]]):
        tokens, mask = model.pad([ids for _, ids in batch])
        for layer, x in model.residuals(tokens, mask, settings.layers).items():
            norms[layer].append(x.float().norm(dim=-1)[mask.bool()])
    return {
        hook_name(layer): norm_bound(torch.cat(found), settings.sink_ratio) for layer, found in norms.items()
    }


def batches(sequences: Sequence[list[int]]) -> Iterable[list[tuple[int, list[int]]]]:
    """(index, ids) of sequences in batches of at most ``BATCH_TOKENS`` padded tokens, shortest first."""
    batch: list[tuple[int, list[int]]] = []
    for item in sorted(enumerate(sequences), key=lambda entry: len(entry[1])):
        if batch and (len(batch) + 1) * len(item[1]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def with_answers(
    model: FrozenModel, sequences: Sequence[TokenSequence], most: int, tick: Callable[[int], None]
) -> list[list[int]]:
    """The ids of each sequence, followed by the model's own answer where it is wanted."""
    full = [list(s.ids) for s in sequences]
    asked = [index for index, s in enumerate(sequences) if s.wants_answer]
    for batch in batches([full[index] for index in asked]):
        answers = model.answers([ids for _, ids in batch], most)
        for (place, _), answer in zip(batch, answers, strict=True):
            full[asked[place]] += answer
        tick(sum(map(len, answers)))
    return full


def _trace_shard(
    model: FrozenModel,
    sequences: Sequence[TokenSequence],
    settings: TraceSettings,
    max_norm: dict[str, float],
    folder: Path,
    index: int,
    progress: Meter,
) -> dict[str, Any]:
    full = with_answers(model, sequences, settings.answer_tokens, lambda _: None)
    rows: dict[int, dict[str, Tensor]] = {}
    sinks = 0
    for batch in batches(full):
        tokens, mask = model.pad([ids for _, ids in batch])
        residuals = model.residuals(tokens, mask, settings.layers)
        norms = {layer: x.float().norm(dim=-1) for layer, x in residuals.items()}
        keep = mask.bool()
        for layer, norm in norms.items():
            keep &= norm <= max_norm[hook_name(layer)]
        sinks += int(mask.sum() - keep.sum())
        for row, (place, _) in enumerate(batch):
            here = keep[row]
            rows[place] = {
                hook_name(layer): x[row, here].to(DTYPES[settings.dtype]).cpu()
                for layer, x in residuals.items()
            } | {
                "tokens": tokens[row, here].int().cpu(),
                "position": here.nonzero()[:, 0].int().cpu(),
                "sequence": torch.full((int(here.sum()),), place, dtype=torch.int32),
            }
        progress.advance(int(mask.sum()))
    names = rows[0]
    data = save_safetensors(
        {k: torch.cat([rows[i][k] for i in range(len(full))]).contiguous() for k in names}
    )
    name = f"shard-{index:05d}.safetensors"
    try:
        write_atomically(folder / name, data)
    except OSError as error:
        raise DiscoveryError(
            f"{folder / name}: cannot be written ({error.strerror}); finished shards stand: run again"
        ) from error
    read = sum(map(len, full))
    return {
        "file": name,
        "read": read,
        "stored": read - sinks,
        "sinks": sinks,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _write_held_out(
    model: FrozenModel,
    sequences: Sequence[TokenSequence],
    settings: TraceSettings,
    folder: Path,
    record: dict[str, Any],
) -> None:
    if not sequences or (folder / HELD_OUT).exists():
        return
    full = with_answers(model, sequences, settings.answer_tokens, lambda _: None)
    tokens, mask = model.pad(full)
    data = save_safetensors({"tokens": tokens.int().cpu(), "mask": mask.to(torch.uint8).cpu()})
    write_atomically(folder / HELD_OUT, data)
    record["held_out"] = {
        "sequences": len(sequences),
        "tokens": int(mask.sum()),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(folder / RECORD, record)


def read_trace_record(folder: Path) -> dict[str, Any]:
    """The record of a trace folder. Raises `DiscoveryError` when there is none, or a damaged one."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except OSError as error:
        raise DiscoveryError(
            f"{folder}: holds no trace ({RECORD} is missing); run mechctl trace first"
        ) from error
    except ValueError as error:
        raise DiscoveryError(
            f"{folder / RECORD}: not JSON ({error}); trace again into another folder"
        ) from error
    if not isinstance(record, dict) or not {"shards", "model", "max_norm"} <= set(record):
        raise DiscoveryError(f"{folder / RECORD}: is not a trace record; trace again into another folder")
    return record
