"""What the commands `trace`, `sae-train` and `fit-gate` do: from settings and paths to files and a line."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from discovery.data.trace_settings import TraceSettings
from discovery.errors import DiscoveryError
from discovery.gates.gate_settings import EditSettings, GateSettings
from discovery.sae.train_settings import TrainSettings
from interpretops.settings import Settings

Say = Callable[[str], None]
WORK = Path("runs/sae-train")


def trace(
    settings: Settings,
    *,
    prompts: Sequence[Path],
    text: Sequence[Path],
    data: Path | None,
    data_folder: Path | None,
    out: Path,
    chosen: TraceSettings,
    workers: int,
    say: Say,
) -> None:
    """Trace prompts and text to ``out``; a run that was stopped goes on."""
    from discovery.data.sources import DataList, Source, read_data_list
    from discovery.data.trace import trace as run
    from discovery.jobs.workers import joined, start_workers

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
            model = frozen_model(settings, say)
        record = run(model, DataList(groups), chosen, out, team)
    if not team.first:
        return
    layers = record["settings"]["layers"]
    stored, sinks = (sum(entry[key] for entry in record["shards"]) for key in ("stored", "sinks"))
    say(
        f"{out}: {len(record['shards'])} shards, {stored:,} tokens stored of "
        f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}, "
        f"{sinks:,} attention sinks left out"
    )


def sae_train(
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
    """Train a dictionary on a trace, measure it on the trace's held-out sequences, write ``out``.

    work  folder of the checkpoint; None: one of this training's own under `WORK`
    """
    from discovery.data.activations import TraceReader
    from discovery.data.trace import read_trace_record
    from discovery.jobs.workers import joined, start_workers
    from discovery.sae.dictionary_artifact import write_dictionary
    from discovery.sae.sae_train import save_dictionary, train, train_digest

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
                model = frozen_model(settings, say)
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


def sae_eval(
    settings: Settings,
    *,
    dictionary: Path,
    trace: Path,
    text: Path | None,
    measured_tokens: int,
    say: Say,
) -> None:
    """Measure a SAELens dictionary on the held-out sequences of a trace, and on a text; write nothing."""
    from interpretops.artifacts.dictionary.manifest import read_manifest

    manifest = read_manifest(dictionary)
    if manifest.layout != "saelens" or manifest.point != "resid_post":
        raise DiscoveryError(
            f"{dictionary}: is of layout {manifest.layout} at {manifest.point}, but what can be measured is "
            "saelens at resid_post"
        )
    bound = float("inf") if manifest.max_norm is None else manifest.max_norm
    model = frozen_model(settings, say)
    if manifest.model.fingerprint != model.spec.fingerprint:
        raise DiscoveryError(
            f"{dictionary}: belongs to {manifest.model.name} (fingerprint "
            f"{manifest.model.fingerprint[:12]}), not to {model.spec.name}; name its model with --model"
        )
    found = _measure(model, trace, manifest.layer, bound, dictionary, text, measured_tokens)
    say(json.dumps(found, indent=1))


def _check_traced(record: dict[str, Any], model: Any, trace: Path) -> None:
    if model.spec.fingerprint != record["model"]["fingerprint"]:
        raise DiscoveryError(
            f"{trace}: was traced from another model ({record['model']['name']}, fingerprint "
            f"{record['model']['fingerprint'][:12]}), not {model.spec.name}; trace again"
        )


def _measure(
    model: Any,
    trace: Path,
    layer: int,
    max_norm: float,
    dictionary: Path,
    text: Path | None,
    measured_tokens: int,
) -> dict[str, Any]:
    from discovery.data.activations import read_held_out, text_to_measure
    from discovery.data.sources import Source
    from discovery.data.trace import read_trace_record
    from discovery.sae.dictionary_artifact import measure

    record = read_trace_record(trace)
    _check_traced(record, model, trace)
    besides = None
    if text is not None:
        context = int(record["settings"]["context"])
        besides = text_to_measure(model, Source(text, "text"), context, measured_tokens)
    return measure(model, layer, max_norm, dictionary, read_held_out(trace, measured_tokens), besides)


def fit_gate(
    settings: Settings,
    *,
    data: Path,
    data_folder: Path | None,
    adapter: str,
    target_class: str,
    policy_id: str,
    out: Path | None,
    work: Path,
    gate: GateSettings,
    edit: EditSettings,
    say: Say,
    join: Sequence[Path] = (),
) -> None:
    """Fit a probe gate and the learned edit behind it; write adapter folder and policy."""
    from discovery.data.sources import read_data_list
    from discovery.gates.fit_gate import GateFit
    from discovery.gates.gate_artifact import policy_text, write_gate
    from discovery.gates.gate_data import load_gate_data
    from discovery.gates.gate_trade import trade
    from interpretops.files.atomic_file import write_atomically

    listed = read_data_list(data, data_folder)
    prompts = load_gate_data(listed, edit.seed)
    store = settings.cache.dir / "activations"
    fit = GateFit(frozen_model(settings, say), prompts, gate, edit, work, join, store)
    trained = fit.train()
    outcomes = fit.outcomes(trained, [*prompts.select, *prompts.test])
    write_atomically(work / "outcomes.json", json.dumps(outcomes).encode())
    threshold = fit.choose_threshold(outcomes)
    report = fit.report(outcomes, threshold)
    root = settings.paths.artifacts / fit.model.spec.name / "adapters"
    curve = trade(outcomes)
    write_gate(fit, trained, listed, root / adapter, target_class, threshold, report, curve)
    text = policy_text(fit, adapter, policy_id, target_class, threshold)
    path = work / f"{policy_id}.yaml" if out is None else out
    write_atomically(path, text.encode())
    for name, row in report.items():
        say(f"{name}: {json.dumps(row)}")
    for point in curve:
        say(f"trade, unseen: {json.dumps(point)}")
    say(f"{root / adapter}: adapter; {path}: policy")


def frozen_model(settings: Settings, say: Say) -> Any:
    import torch

    from discovery.frozen_model import FrozenModel
    from interpretops.model.device import pick_device
    from interpretops.model.source import resolve_model

    device = pick_device(settings.model.device)
    folder = resolve_model(settings.model.name, settings.cache.dir, say, revision=settings.model.revision)
    dtype = torch.bfloat16 if settings.model.dtype == "auto" else getattr(torch, settings.model.dtype)
    return FrozenModel(folder, dtype, device)


def _refuse_noncommercial(data: dict[str, list[dict[str, Any]]]) -> None:
    from discovery.data.sources import Source, refuse_noncommercial

    listed = [
        Source(Path(entry["path"]), entry["kind"], entry.get("licence", "not stated"))
        for entries in data.values()
        for entry in entries
    ]
    refuse_noncommercial(listed, purpose="a dictionary")
