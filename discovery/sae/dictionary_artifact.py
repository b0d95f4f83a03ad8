"""Writes a trained dictionary's manifest: model, site, data, and metrics on held-out text."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from discovery.data.activations import HeldOut, TraceReader
from discovery.data.sources import licence_of_weights
from discovery.frozen_model import FrozenModel
from discovery.jobs.run_record import run_record
from discovery.jobs.whole_file import write_json
from discovery.sae.sae_train import WEIGHTS, reconstruction
from discovery.sae.saelens_metrics import saelens_metrics
from discovery.sae.splice import splice_by_part
from discovery.sae.train_settings import TrainSettings
from interpretops.artifacts.dictionary.manifest import (
    DictionaryManifest,
    MetricsRecord,
    ModelReference,
    TrainingRecord,
    WeightsReference,
    sha256_of,
    write_manifest,
)


def measure(
    model: FrozenModel,
    layer: int,
    max_norm: float,
    folder: Path,
    held_out: HeldOut,
    text: HeldOut | None = None,
) -> dict[str, Any]:
    """Measure the dictionary stored in ``folder`` by splicing it into the model on the held-out sequences.

    Gives the metrics over all sequences, over each part, and ``saelens``: SAELens' own evaluation on the same
    tokens. ``text`` is measured in addition and counts only for its own part.
    """
    rebuild = reconstruction(folder)
    told = (model, layer, max_norm, rebuild)
    whole, parts = splice_by_part(*told, held_out.tokens, held_out.mask, held_out.parts)
    if text is not None:
        parts |= splice_by_part(*told, text.tokens, text.mask, text.parts)[1]
    saelens = saelens_metrics(model, layer, max_norm, folder, held_out.tokens, held_out.mask)
    shown = {name: part.record() for name, part in parts.items()}
    return whole.record() | {"parts": shown, "saelens": saelens}


def write_dictionary(
    reader: TraceReader, settings: TrainSettings, metrics: dict[str, Any], folder: Path
) -> None:
    """Write manifest and run record into ``folder``, next to the weights."""
    settings = settings.filled(reader.record)
    assert settings.tokens is not None
    model = reader.record["model"]
    entries = [entry for group in reader.record["data"].values() for entry in group]
    record = run_record("sae-train", settings.seed, asdict(settings), reader.record["data"])
    traced = {key: reader.record[key] for key in ("settings", "seed", "commit", "max_norm", "held_out")}
    write_json(folder / "run.json", record | {"trace": traced, "metrics": metrics})
    manifest = DictionaryManifest(
        id=folder.name,
        layout="saelens",
        model=ModelReference(name=model["name"], fingerprint=model["fingerprint"]),
        layer=reader.layer,
        point="resid_post",
        width=settings.width,
        hidden_size=int(model["hidden_size"]),
        activation="jumprelu",
        max_norm=round(reader.max_norm, 2),
        weights=WeightsReference(file=WEIGHTS, sha256=sha256_of(folder / WEIGHTS)),
        license=licence_of_weights(entry.get("licence", "") for entry in entries),
        training=TrainingRecord(
            data=tuple(
                f"{entry.get('name', entry['path'])} ({entry.get('licence', 'not stated')})"
                for entry in entries
            ),
            tokens=settings.tokens,
            seed=settings.seed,
            method="SAELens BatchTopK, saved as JumpReLU",
            k=settings.k,
            traced_tokens=len(reader.activations),
            commit=record["commit"],
        ),
        metrics=MetricsRecord(**metrics),
    )
    write_manifest(folder, manifest)
