"""A compiled policy as a value: its numbers, its file's bytes, and the sha256 that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as save_safetensors

from interpretops.files.atomic_file import write_atomically
from interpretops.plan.digest import content_digest
from interpretops.plan.edits import UNIT_FIELDS, SiteEdits
from interpretops.plan.gates import ALWAYS, Gate
from interpretops.plan.sites import ModelSpec, Site

FORMAT_VERSION = 1
METADATA_KEY = "interpretops.plan"


@dataclass(frozen=True, eq=False)
class Plan:
    """A compiled policy. Equality is equality of `revision`."""

    policy_id: str
    target_class: str
    model: ModelSpec
    edits: Mapping[Site, SiteEdits]
    gates: tuple[Gate, ...] = (ALWAYS,)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON: which dictionaries and adapters the numbers came from, by sha256."""

    @property
    def revision(self) -> str:
        """sha256 of the plan file: the revision's name everywhere."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The plan file: safetensors, the same bytes for the same plan."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        sites = sorted(self.edits, key=lambda site: site.order)
        for site in sites:
            edits = self.edits[site]
            for name in UNIT_FIELDS:
                tensors[f"{site}.units.{name}"] = getattr(edits.units, name)
            if edits.head_scale is not None:
                tensors[f"{site}.head_scale.delta"] = edits.head_scale.delta
                tensors[f"{site}.head_scale.gate"] = edits.head_scale.gate
            if edits.topk is not None:
                tensors[f"{site}.topk.read"] = edits.topk.read
                tensors[f"{site}.topk.bias"] = edits.topk.bias
        for index, gate in enumerate(self.gates):
            for name, array in gate.tensors.items():
                tensors[f"gates.{index}.{name}"] = array
        header = {
            "format": FORMAT_VERSION,
            "policy_id": self.policy_id,
            "target_class": self.target_class,
            "model": asdict(self.model),
            "sites": {str(s): {"k": t.k if (t := self.edits[s].topk) else None} for s in sites},
            "gates": [
                {
                    "site": None if gate.site is None else str(gate.site),
                    "combine": gate.combine,
                    "scope": gate.scope,
                    "latched": gate.latched,
                    "phase": gate.phase,
                    "max_norm": _finite(gate.max_norm),
                }
                | ({"probe": [[str(p.site), _finite(p.max_norm)] for p in gate.probe]} if gate.probe else {})
                | ({} if gate.refusal is None else {"refusal": gate.refusal})
                for gate in self.gates
            ],
            "provenance": dict(self.provenance),
        }
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
        # One metadata key only: the writer does not keep several in order.
        return save_safetensors(
            {name: np.ascontiguousarray(array) for name, array in tensors.items()}, {METADATA_KEY: text}
        )

    def digest(self) -> str:
        """sha256 over only the numbers; equals `PlanBank.digest` of the loaded plan's tables."""
        edits: dict[Site, dict[str, npt.NDArray[Any]]] = {}
        for site, here in self.edits.items():
            width = self.model.width(site.point)
            arrays: dict[str, npt.NDArray[Any]] = {name: getattr(here.units, name) for name in UNIT_FIELDS}
            scale = here.head_scale
            arrays["scale"] = np.zeros((0, width), np.float32) if scale is None else scale.delta
            arrays["scale_gate"] = np.zeros(0, np.int32) if scale is None else scale.gate
            if here.topk is not None:
                arrays["topk_read"], arrays["topk_bias"] = here.topk.read, here.topk.bias
            edits[site] = arrays
        return content_digest(
            edits,
            [(gate.site, gate.tensors) for gate in self.gates[1:]],
        )

    def save(self, folder: Path) -> Path:
        """Write ``folder/<revision>.safetensors`` atomically."""
        data = self.to_bytes()
        path = folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        write_atomically(path, data)
        return path


def _finite(bound: float) -> float | None:
    return None if np.isinf(bound) else bound
