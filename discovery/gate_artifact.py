"""Writing what `fit-gate` found: the adapter folder with its probe, and the policy that uses both."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save as save_safetensors

from discovery.fit_gate import GateFit
from discovery.gated_edit import settings_record
from discovery.low_rank import LowRankRows
from discovery.run_record import run_record, write_json
from discovery.sources import DataList
from interpretops.adapter import AdapterSite, write_adapter
from interpretops.atomic_file import write_atomically
from interpretops.dictionary.manifest import MetricsRecord, TrainingRecord, write_manifest
from interpretops.plan import Site
from interpretops.site import Point

PROBE = "probe.safetensors"
POINT: Point = "resid_post"


def write_gate(
    fit: GateFit,
    edit: LowRankRows,
    data: DataList,
    folder: Path,
    target_class: str,
    threshold: float,
    report: dict[str, Any],
) -> Path:
    """Write adapter, probe, manifest and run record to ``folder``. Returns the manifest's path."""
    sites = {}
    parts = [(fit.gate.rows, fit.gate_settings.rows_at), (edit, fit.edit_settings.layers)]
    for rows, layers in parts:
        for layer in layers:
            read, bias, write = (tensor.numpy().astype(np.float32) for tensor in rows.rows(layer))
            sites[Site(layer, POINT)] = AdapterSite(read, write, bias, "relu", round(fit.max_norm[layer], 1))
    direction, _ = fit.gate.probe()
    record = run_record(
        "fit-gate",
        fit.edit_settings.seed,
        {"gate": asdict(fit.gate_settings), "edit": settings_record(fit.edit_settings)},
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
        method="ReLU rows on the prompt, a probe at its end, ReLU rows behind it, through the frozen model",
        steps=fit.gate_settings.steps + fit.edit_settings.steps,
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
    write_atomically(folder / PROBE, save_safetensors({"probe": direction.numpy().astype(np.float32)}))
    write_json(
        folder / "run.json", record | {"results": json.loads(json.dumps(report)), "threshold": threshold}
    )
    return write_manifest(folder, manifest.model_copy(update={"metrics": metrics}))


def policy_text(fit: GateFit, adapter: str, policy_id: str, target_class: str, threshold: float) -> str:
    """The policy file: the gate's rows on the prompt, and the edit behind the gate."""
    _, bias = fit.gate.probe()
    gates: dict[str, Any] = {}
    interventions = []
    if fit.gate_settings.rows_at:
        gates["while-reading"] = {"phase": "prefill"}
        interventions.append(_lora(adapter, fit.gate_settings.rows_at, "while-reading"))
    gates["harmful-request"] = {
        "layer": fit.gate_settings.layer,
        "point": POINT,
        "conditions": [
            {
                "probe": {"file": f"adapters/{adapter}/{PROBE}", "tensor": "probe"},
                "bias": round(bias, 6),
                "threshold": threshold,
            }
        ],
        "scope": "prompt_end",
        "latched": True,
        "max_norm": round(fit.max_norm[fit.gate_settings.layer], 1),
    }
    interventions.append(_lora(adapter, fit.edit_settings.layers, "harmful-request"))
    policy = {
        "meta": {
            "id": policy_id,
            "description": "Refuses when a probe at the end of the prompt reads a harmful request",
            "target_class": target_class,
        },
        "gates": gates,
        "interventions": interventions,
    }
    return yaml.safe_dump(policy, sort_keys=False, width=110)


def _lora(adapter: str, layers: tuple[int, ...], gate: str) -> dict[str, Any]:
    return {
        "type": "lora_gate",
        "selector": {"block": "resid", "layers": list(layers)},
        "adapter": adapter,
        "alpha": 1.0,
        "gate": gate,
    }
