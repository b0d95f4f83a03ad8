"""Writes the results of `fit-gate`: the adapter folder with its probe, and the policy that uses both."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save as save_safetensors

from discovery.data.sources import DataList, sha256_of_file
from discovery.gates.fit_gate import GateFit
from discovery.gates.gated_edit import settings_record
from discovery.gates.low_rank import LowRankRows
from discovery.jobs.run_record import run_record
from discovery.jobs.whole_file import write_json
from interpretops.artifacts.adapter import AdapterSite, write_adapter
from interpretops.artifacts.dictionary.manifest import MetricsRecord, TrainingRecord, write_manifest
from interpretops.artifacts.vectors import FINGERPRINT_KEY
from interpretops.files.atomic_file import write_atomically
from interpretops.plan import Site
from interpretops.plan.sites import Point

PROBE = "probe.safetensors"
POINT: Point = "resid_post"
GATE = "harmful-request"


def write_gate(
    fit: GateFit,
    edit: LowRankRows,
    data: DataList,
    folder: Path,
    target_class: str,
    threshold: float,
    report: dict[str, Any],
    curve: Sequence[Mapping[str, float]] = (),
) -> Path:
    """Write adapter, probe, manifest and run record to ``folder``. Returns the manifest's path."""
    sites = {}
    for layer in fit.edit_settings.layers:
        read, bias, write = (tensor.numpy().astype(np.float32) for tensor in edit.rows(layer))
        sites[Site(layer, POINT)] = AdapterSite(read, write, bias, "relu", round(fit.max_norm[layer], 1))
    record = run_record(
        "fit-gate",
        fit.edit_settings.seed,
        {
            "gate": asdict(fit.gate_settings),
            "joined": [{"file": path.name, "sha256": sha256_of_file(path)} for path in fit.join],
            "edit": settings_record(fit.edit_settings),
        },
        data.record(),
    )
    trained = {
        name: sources for name, sources in data.groups.items() if not name.startswith(("test_", "select_"))
    }
    training = TrainingRecord(
        data=tuple(
            sorted({f"{s.name or s.path.stem} ({s.licence})" for group in trained.values() for s in group})
        ),
        seed=fit.edit_settings.seed,
        method="an attention probe over the prompt, ReLU rows behind it trained through the frozen model",
        steps=fit.edit_settings.steps,
        commit=record["commit"],
    )
    manifest = write_adapter(
        folder,
        sites,
        target_class=target_class,
        model=fit.model.spec,
        training=training,
        license_name="Apache-2.0",
    )
    metrics = MetricsRecord(
        probe_auroc_unseen=round(fit.probe_auroc(fit.data.test), 4),
        gate_threshold=threshold,
        unseen={name.removeprefix("test_"): row for name, row in report.items() if name.startswith("test_")},
        selection={
            name.removeprefix("select_"): row for name, row in report.items() if name.startswith("select_")
        },
    )
    probe = {
        f"{layer}.{name}": tensor.numpy().astype(np.float32)
        for layer, numbers in fit.gate.numbers().items()
        for name, tensor in numbers.items()
    }
    for layer in fit.gate_settings.layers:
        probe[f"{layer}.max_norm"] = np.array([round(fit.max_norm[layer], 1)], np.float32)
    write_atomically(folder / PROBE, save_safetensors(probe, {FINGERPRINT_KEY: fit.model.spec.fingerprint}))
    results = {"results": json.loads(json.dumps(report)), "threshold": threshold, "curve": list(curve)}
    write_json(folder / "run.json", record | results)
    return write_manifest(folder, manifest.model_copy(update={"metrics": metrics}))


def policy_text(fit: GateFit, adapter: str, policy_id: str, target_class: str, threshold: float) -> str:
    """The text of the policy file: the probe's gate, and the edit behind it."""
    policy = {
        "meta": {
            "id": policy_id,
            "description": "Refuses when an attention probe over the prompt reads a harmful request",
            "target_class": target_class,
        },
        "gates": {
            GATE: {
                "layer": fit.gate_settings.layers[-1],
                "point": POINT,
                "conditions": [{"attention_probe": f"adapters/{adapter}/{PROBE}", "threshold": threshold}],
                "scope": "prompt",
                **({} if fit.gate_settings.window is None else {"window": fit.gate_settings.window}),
                "latched": True,
            }
        },
        "interventions": [
            {
                "type": "lora_gate",
                "selector": {"block": "resid", "layers": list(fit.edit_settings.layers)},
                "adapter": adapter,
                "alpha": 1.0,
                "gate": GATE,
            }
        ],
    }
    return yaml.safe_dump(policy, sort_keys=False, width=110)
