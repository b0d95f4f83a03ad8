"""The plan: a policy compiled to the numbers the engine applies, immutable and named by its sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from interpretops.atomic_file import write_atomically
from interpretops.errors import PlanError
from interpretops.plan_check import check_plan
from interpretops.plan_parts import (
    ALWAYS,
    INT_FIELDS,
    MAX_GATES,
    PROBE_FIELDS,
    UNIT_FIELDS,
    Array,
    Combine,
    Gate,
    HeadScale,
    IntArray,
    Phase,
    ProbePart,
    Scope,
    SiteEdits,
    TopK,
    Units,
    empty_units,
)
from interpretops.site import HEAD_POINTS, POINTS, ModelSpec, Point, Site

__all__ = [
    "ALWAYS",
    "HEAD_POINTS",
    "INT_FIELDS",
    "MAX_GATES",
    "POINTS",
    "PROBE_FIELDS",
    "UNIT_FIELDS",
    "Array",
    "Combine",
    "Gate",
    "HeadScale",
    "IntArray",
    "ModelSpec",
    "Phase",
    "Plan",
    "Point",
    "ProbePart",
    "Scope",
    "Site",
    "SiteEdits",
    "TopK",
    "Units",
    "content_digest",
    "empty_units",
]

FORMAT_VERSION = 1
METADATA_KEY = "interpretops.plan"
_UNREADABLE = (
    SafetensorError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


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
                for gate in self.gates
            ],
            "provenance": dict(self.provenance),
        }
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
        # One metadata key only: the writer keeps no order among several.
        return save_safetensors(
            {name: np.ascontiguousarray(array) for name, array in tensors.items()}, {METADATA_KEY: text}
        )

    def digest(self) -> str:
        """sha256 over the numbers alone, as `PlanBank.digest` takes it from the tables of a loaded plan."""
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
        """Write ``folder/<revision>.safetensors`` whole or not at all."""
        data = self.to_bytes()
        path = folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        write_atomically(path, data)
        return path

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Read a plan file; raises `PlanError` on anything that is not a whole, finite, consistent plan."""
        try:
            plan = cls._assemble(_read_header(data), load_safetensors(data))
            check_plan(plan)
            canonical = plan.to_bytes() == data
        except _UNREADABLE as error:
            raise PlanError(f"plan file unreadable: {error}; compile the policy again") from error
        if not canonical:  # else the file's sha256 and the plan's revision could differ
            raise PlanError("plan file is not as this build writes it; compile the policy again")
        return plan

    @classmethod
    def _assemble(cls, header: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> Plan:
        if header["format"] != FORMAT_VERSION:
            raise PlanError(
                f"plan format = {header['format']!r}, but this build reads {FORMAT_VERSION}; compile again"
            )
        edits: dict[Site, SiteEdits] = {}
        for text, extra in header["sites"].items():
            units = Units(**{name: tensors.pop(f"{text}.units.{name}") for name in UNIT_FIELDS})
            scale = tensors.pop(f"{text}.head_scale.delta", None)
            encoder = tensors.pop(f"{text}.topk.read", None)
            edits[Site.parse(text)] = SiteEdits(
                units,
                None if scale is None else HeadScale(scale, tensors.pop(f"{text}.head_scale.gate")),
                None if encoder is None else TopK(encoder, tensors.pop(f"{text}.topk.bias"), int(extra["k"])),
            )
        gates = tuple(
            Gate(
                site=None if item["site"] is None else Site.parse(item["site"]),
                read=tensors.pop(f"gates.{index}.read"),
                bias=tensors.pop(f"gates.{index}.bias"),
                cut=tensors.pop(f"gates.{index}.cut"),
                combine=item["combine"],
                scope=item["scope"],
                latched=item["latched"],
                phase=item["phase"],
                max_norm=float("inf") if item["max_norm"] is None else float(item["max_norm"]),
                probe=tuple(
                    ProbePart(
                        Site.parse(site),
                        tensors.pop(f"gates.{index}.{site}.query"),
                        tensors.pop(f"gates.{index}.{site}.read"),
                        tensors.pop(f"gates.{index}.{site}.bias"),
                        float("inf") if bound is None else float(bound),
                    )
                    for site, bound in item.get("probe", ())
                ),
            )
            for index, item in enumerate(header["gates"])
        )
        if tensors:
            raise PlanError(f"plan file carries unknown tensors {sorted(tensors)}; compile the policy again")
        return cls(
            header["policy_id"],
            header["target_class"],
            ModelSpec(**header["model"]),
            edits,
            gates,
            header["provenance"],
        )


def _finite(bound: float) -> float | None:
    return None if np.isinf(bound) else bound


def content_digest(
    edits: Mapping[Site, Mapping[str, npt.NDArray[Any]]],
    gates: Sequence[tuple[Site | None, Mapping[str, npt.NDArray[Any]]]],
) -> str:
    """sha256 over the arrays of every site and gate, in an order of their own."""
    digest = hashlib.sha256()

    def feed(where: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            digest.update(f"{where}.{name}:{array.dtype.str}{array.shape}".encode())
            digest.update(array.tobytes())

    for site in sorted(edits, key=lambda site: site.order):
        feed(str(site), edits[site])
    for index, (reads_at, arrays) in enumerate(gates):
        feed(f"gate {index} {reads_at}", arrays)
    return digest.hexdigest()


def _read_header(data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        raise PlanError(f"plan file has {len(data)} bytes: not a safetensors file")
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise PlanError("plan file is cut short; compile the policy again")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    if METADATA_KEY not in metadata:
        raise PlanError(f"not a plan: the file has no {METADATA_KEY!r} record")
    header = json.loads(metadata[METADATA_KEY])
    if not isinstance(header, dict):
        raise PlanError("plan record is not an object")
    return header
