"""`mechctl sae-train` and `sae-eval`: train a dictionary on a trace, and measure what it costs the model."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from discovery.data.activations import TraceReader, read_held_out, text_to_measure
from discovery.data.sources import Source, refuse_noncommercial
from discovery.data.trace import read_trace_record
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel, open_frozen_model
from discovery.jobs.workers import joined, start_workers
from discovery.sae.dictionary_artifact import measure, write_dictionary
from discovery.sae.sae_train import save_dictionary, train, train_digest
from discovery.sae.train_settings import TrainSettings
from interpretops.artifacts.dictionary.manifest import read_manifest
from interpretops.settings import Settings

Say = Callable[[str], None]
WORK = Path("runs/sae-train")
"""Holds a folder for the checkpoint of each training, unless `--work` names one."""


def run_sae_train(
    settings: Settings,
    *,
    trace: Path,
    out: Path,
    work: Path | None,
    text: Path | None,
    measured_tokens: int,
    chosen: TrainSettings,
    say: Say,
) -> None:
    """Train a dictionary on a trace, measure it on the trace's held-out sequences, and write ``out``.

    work  folder of the checkpoint; None: this training's own folder under `WORK`
    """
    if work is not None and work.resolve().is_relative_to(out.resolve()):
        raise DiscoveryError(f"--work {work}: lies in --out {out}, whose old files go; name another folder")
    chosen = chosen.filled(read_trace_record(trace))
    assert chosen.layer is not None
    if start_workers(chosen.workers, sys.argv[1:]):
        return
    with joined(chosen.workers) as team:
        with team.agreeing():
            reader = TraceReader(trace, chosen.layer)
            work = work or WORK / train_digest(reader, chosen)
            _refuse_noncommercial(reader.record["data"])
            if team.first:
                model = open_frozen_model(settings, say)
                _check_traced(reader.record, model, trace)
        trainer = train(reader, chosen, work, team=team)
    if not team.first:
        return
    draft = work / "dictionary" / out.name
    save_dictionary(trainer, draft)
    metrics = _measure(model, trace, chosen.layer, reader.max_norm, draft, text, measured_tokens)
    write_dictionary(reader, chosen, metrics, draft)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(draft, out)
    say(f"{out}: {json.dumps(metrics)}")


def run_sae_eval(
    settings: Settings,
    *,
    dictionary: Path,
    trace: Path,
    text: Path | None,
    measured_tokens: int,
    say: Say,
) -> None:
    """Measure a SAELens dictionary on the held-out sequences of a trace, and on a text; write nothing."""

    manifest = read_manifest(dictionary)
    if manifest.layout != "saelens" or manifest.point != "resid_post":
        raise DiscoveryError(
            f"{dictionary}: is of layout {manifest.layout} at {manifest.point}, but what can be measured is "
            "saelens at resid_post"
        )
    bound = float("inf") if manifest.max_norm is None else manifest.max_norm
    model = open_frozen_model(settings, say)
    if manifest.model.fingerprint != model.spec.fingerprint:
        raise DiscoveryError(
            f"{dictionary}: belongs to {manifest.model.name} (fingerprint "
            f"{manifest.model.fingerprint[:12]}), not to {model.spec.name}; name its model with --model"
        )
    found = _measure(model, trace, manifest.layer, bound, dictionary, text, measured_tokens)
    say(json.dumps(found, indent=1))


def _check_traced(record: dict[str, Any], model: FrozenModel, trace: Path) -> None:
    if model.spec.fingerprint != record["model"]["fingerprint"]:
        raise DiscoveryError(
            f"{trace}: was traced from another model ({record['model']['name']}, fingerprint "
            f"{record['model']['fingerprint'][:12]}), not {model.spec.name}; trace again"
        )


def _measure(
    model: FrozenModel,
    trace: Path,
    layer: int,
    max_norm: float,
    dictionary: Path,
    text: Path | None,
    measured_tokens: int,
) -> dict[str, Any]:

    record = read_trace_record(trace)
    _check_traced(record, model, trace)
    besides = None
    if text is not None:
        context = int(record["settings"]["context"])
        besides = text_to_measure(model, Source(text, "text"), context, measured_tokens)
    return measure(model, layer, max_norm, dictionary, read_held_out(trace, measured_tokens), besides)


def _refuse_noncommercial(data: dict[str, list[dict[str, Any]]]) -> None:

    listed = [
        Source(Path(entry["path"]), entry["kind"], entry.get("licence", "not stated"))
        for entries in data.values()
        for entry in entries
    ]
    refuse_noncommercial(listed, purpose="a dictionary")
