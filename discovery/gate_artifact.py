"""Writing what `fit-gate` found: the adapter folder with its probe, and the policy that uses both."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save as save_safetensors

from discovery.fit_gate import GateFit
from discovery.gated_edit import GatedEdit, settings_record
from discovery.run_record import run_record, write_json
from discovery.sources import DataList
from interpretops.adapter import AdapterSite, write_adapter
from interpretops.atomic_file import write_atomically
from interpretops.dictionary.manifest import MetricsRecord, TrainingRecord, write_manifest
from interpretops.plan import Site

PROBE = "probe.safetensors"
POINT = "resid_post"


def write_gate(
    fit: GateFit,
    edit: GatedEdit,
    data: DataList,
    folder: Path,
    target_class: str,
    threshold: float,
    report: dict[str, Any],
) -> Path:
    """Write adapter, probe, manifest and run record to ``folder``. Returns the manifest's path."""
    sites = {}
    for layer in fit.edit_settings.layers:
        read, bias, write = (tensor.numpy().astype(np.float32) for tensor in edit.rows(layer))
        sites[Site(layer, "resid_post")] = AdapterSite(
            read, write, bias, "relu", round(fit.max_norm[layer], 1)
        )
    record = run_record(
        "fit-gate",
        fit.edit_settings.seed,
        {"gate": asdict(fit.gate), "edit": settings_record(fit.edit_settings)},
        data.record(),
    )
    trained = {
        name: sources for name, sources in data.groups.items() if not name.startswith(("test_", "select_"))
    }
    training = TrainingRecord(
        data=tuple(sorted({f"{s.name} ({s.licence})" for group in trained.values() for s in group})),
        seed=fit.edit_settings.seed,
        method="probe at the end of the prompt, ReLU rows trained through the frozen model",
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
    write_atomically(
        folder / PROBE, save_safetensors({"probe": fit.probe.direction.numpy().astype(np.float32)})
    )
    write_json(
        folder / "run.json", record | {"results": json.loads(json.dumps(report)), "threshold": threshold}
    )
    return write_manifest(folder, manifest.model_copy(update={"metrics": metrics}))


def policy_text(fit: GateFit, adapter: str, policy_id: str, target_class: str, threshold: float) -> str:
    """The policy file that puts the edit behind the gate."""
    policy = {
        "meta": {
            "id": policy_id,
            "description": "Refuses when a probe at the end of the prompt reads a harmful request",
            "target_class": target_class,
        },
        "gates": {
            "harmful-request": {
                "layer": fit.gate.layer,
                "point": POINT,
                "conditions": [
                    {
                        "probe": {"file": f"adapters/{adapter}/{PROBE}", "tensor": "probe"},
                        "bias": round(fit.probe.bias, 6),
                        "threshold": threshold,
                    }
                ],
                "scope": "prompt_end",
                "latched": True,
                "max_norm": round(fit.max_norm[fit.gate.layer], 1),
            }
        },
        "interventions": [
            {
                "type": "lora_gate",
                "selector": {"block": "resid"},
                "adapter": adapter,
                "alpha": 1.0,
                "gate": "harmful-request",
            }
        ],
    }
    return yaml.safe_dump(policy, sort_keys=False, width=110)
