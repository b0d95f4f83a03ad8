"""`mechctl trace`: traces prompts and text to disk, and reports what was stored."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from discovery.data.sources import DataList, Source, read_data_list
from discovery.data.trace import trace
from discovery.data.trace_settings import TraceSettings
from discovery.errors import DiscoveryError
from discovery.frozen_model import open_frozen_model
from discovery.jobs.workers import joined, start_workers
from interpretops.settings import Settings


def run_trace(
    settings: Settings,
    *,
    prompts: Sequence[Path],
    text: Sequence[Path],
    data: Path | None,
    data_folder: Path | None,
    out: Path,
    chosen: TraceSettings,
    workers: int,
    say: Callable[[str], None],
) -> None:
    """Trace prompts and text to ``out``; an interrupted run resumes."""
    groups = dict(read_data_list(data, data_folder).groups) if data is not None else {}
    given = [Source(path, "prompts") for path in prompts] + [Source(path, "text") for path in text]
    if given:
        groups["given"] = tuple(given)
    if not groups:
        raise DiscoveryError("no data: name --prompts, --text or a list of files with --data")
    if start_workers(workers, sys.argv[1:]):
        return
    with joined(workers) as team:
        with team.agreeing():
            model = open_frozen_model(settings, say)
        record = trace(model, DataList(groups), chosen, out, team)
    if not team.first:
        return
    layers = record["settings"]["layers"]
    stored, sinks = (sum(entry[key] for entry in record["shards"]) for key in ("stored", "sinks"))
    say(
        f"{out}: {len(record['shards'])} shards, {stored:,} tokens stored of "
        f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}, "
        f"{sinks:,} attention sinks left out"
    )
