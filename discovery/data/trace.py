"""Tracing: runs prompts and text through the model and writes residual activations to safetensors shards.

A stopped trace can be resumed. A trace folder holds ``trace.json`` (the run record and the list of finished
shards), the shards
(``shard-00000.safetensors``, …, each with ``blocks.<l>.hook_resid_post`` [T, D], ``tokens`` [T],
``position`` [T] and ``sequence`` [T]), and ``held_out.safetensors``: the token ids of sequences that were
held out for measuring, each with its kind (index in `KINDS`).
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from discovery.data.sequences import TokenSequence, build_sequences, continued
from discovery.data.sequences import batches as batches
from discovery.data.sources import KINDS, DataList
from discovery.data.trace_settings import TraceSettings
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel, hook_name, norm_bound
from discovery.jobs.progress import meter
from discovery.jobs.run_record import run_record
from discovery.jobs.stopping import stoppable
from discovery.jobs.whole_file import write_json, write_whole
from discovery.jobs.workers import ALONE, Team

RECORD = "trace.json"
HELD_OUT = "held_out.safetensors"
PILOT_SEQUENCES = 32
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def trace(
    model: FrozenModel, data: DataList, settings: TraceSettings, folder: Path, team: Team = ALONE
) -> dict[str, Any]:
    """Trace into ``folder``, or resume a stopped run of the same trace. Returns the record.

    The workers of a team process shards in parallel; a shard's content depends only on its number.
    """
    if not settings.layers:
        settings = replace(settings, layers=(model.spec.num_layers // 2,))
    model.check_layers(settings.layers)
    sources = [source for group in data.groups.values() for source in group]
    sequences = build_sequences(
        model, sources, settings.context, settings.answer_tokens, settings.written_tokens
    )
    random.Random(settings.seed).shuffle(sequences)  # noqa: S311 (an order, no secret)
    held_out = sequences[: round(len(sequences) * settings.held_out_share)]
    kept = sequences[len(held_out) :]
    shards = [kept[i : i + settings.shard_sequences] for i in range(0, len(kept), settings.shard_sequences)]
    record: dict[str, Any] = {}
    with team.agreeing():
        if team.first:
            record = _begin(model, data, settings, folder, kept)
            _write_held_out(model, held_out, settings, folder, record)
    record = team.gather(record)[0]
    with team.agreeing():
        if record["sequences"] != _identity(kept):
            raise DiscoveryError("data: differ between workers; give each of them the same files")
    added = {"": 0, "answer": settings.answer_tokens, "text": settings.written_tokens}
    total = sum(len(s.ids) + added[s.follow] for s in kept)
    done = sum(entry["read"] for entry in record["shards"])
    with stoppable() as stop, meter("trace", total, "tokens", done, shown=team.first) as progress:

        def advance(tokens: int) -> None:
            progress.advance(tokens)
            stop.check(f"{len(record['shards'])} of {len(shards)} shards are finished")

        for begin in range(len(record["shards"]), len(shards), team.count):
            index, own = begin + team.rank, None
            with team.agreeing():
                if index < len(shards):
                    own = _trace_shard(
                        model, shards[index], settings, record["max_norm"], folder, index, advance
                    )
            made = [entry for entry in team.gather(own) if entry is not None]
            progress.advance(sum(entry["read"] for entry in made if entry != own))
            record["shards"] += made
            record["complete"] = len(record["shards"]) == len(shards)
            with team.agreeing():
                if team.first:
                    write_json(folder / RECORD, record)
    return record


def _begin(
    model: FrozenModel, data: DataList, settings: TraceSettings, folder: Path, kept: Sequence[TokenSequence]
) -> dict[str, Any]:
    """The record to continue: the folder's own if it belongs to the same trace, else a new one."""
    plain = json.loads(json.dumps(asdict(settings)))
    record = run_record("trace", settings.seed, plain, data.record())
    record["model"] = asdict(model.spec)
    record["sequences"] = _identity(kept)
    path = folder / RECORD
    if path.exists():
        earlier = read_trace_record(folder)
        for key in ("model", "settings", "sequences"):
            if earlier.get(key) != record[key]:
                changed = earlier.get(key), record[key]
                raise DiscoveryError(
                    f"{path}: {key} belongs to another trace ({_difference(*changed)}); name another --out"
                )
        return earlier
    record["max_norm"] = _norm_bounds(model, kept, settings)
    record["shards"] = []
    record["complete"] = False
    write_json(path, record)
    return record


def _identity(sequences: Sequence[TokenSequence]) -> str:
    return hashlib.sha256(repr([s.ids for s in sequences]).encode()).hexdigest()


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


def _trace_shard(
    model: FrozenModel,
    sequences: Sequence[TokenSequence],
    settings: TraceSettings,
    max_norm: dict[str, float],
    folder: Path,
    index: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    full = _continued(model, sequences, settings, index)
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
        advance(int(mask.sum()))
    names = rows[0]
    data = save_safetensors(
        {k: torch.cat([rows[i][k] for i in range(len(full))]).contiguous() for k in names}
    )
    name = f"shard-{index:05d}.safetensors"
    write_whole(folder / name, data)
    read = sum(map(len, full))
    return {
        "file": name,
        "read": read,
        "stored": read - sinks,
        "sinks": sinks,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _continued(
    model: FrozenModel, sequences: Sequence[TokenSequence], settings: TraceSettings, shard: int
) -> list[list[int]]:
    seed = settings.seed * 1_000_003 + shard + 1
    return continued(model, sequences, settings.answer_tokens, settings.written_tokens, seed)


def _write_held_out(
    model: FrozenModel,
    sequences: Sequence[TokenSequence],
    settings: TraceSettings,
    folder: Path,
    record: dict[str, Any],
) -> None:
    if not sequences or "held_out" in record:
        return
    full = _continued(model, sequences, settings, -1)
    tokens, mask = model.pad(full)
    kinds = torch.tensor([KINDS.index(s.kind) for s in sequences], dtype=torch.uint8)
    data = save_safetensors({"tokens": tokens.int().cpu(), "mask": mask.to(torch.uint8).cpu(), "kind": kinds})
    write_whole(folder / HELD_OUT, data)
    record["held_out"] = {
        "sequences": len(sequences),
        "tokens": int(mask.sum()),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(folder / RECORD, record)


def read_trace_record(folder: Path) -> dict[str, Any]:
    """The record of a trace folder. Raises `DiscoveryError` if it is missing or damaged."""
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
