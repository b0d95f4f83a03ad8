"""Reads a plan file and refuses anything but a complete, finite, consistent plan."""

import json
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from interpretops.errors import PlanError
from interpretops.plan.check import check_plan
from interpretops.plan.edits import UNIT_FIELDS, HeadScaling, SiteEdits, TopK, Units
from interpretops.plan.gates import REFUSAL, Gate, ProbePart
from interpretops.plan.plan import FORMAT_VERSION, METADATA_KEY, Plan
from interpretops.plan.sites import ModelSpec, Site

_UNREADABLE = (
    SafetensorError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def read_plan(data: bytes) -> Plan:
    """Read a plan file; raises `PlanError` for anything but a complete, finite, consistent plan."""
    try:
        plan = _assemble(_read_header(data), load_safetensors(data))
        check_plan(plan)
        canonical = plan.to_bytes() == data
    except _UNREADABLE as error:
        raise PlanError(f"plan file unreadable: {error}; compile the policy again") from error
    if not canonical:  # else the file's sha256 and the plan's revision could differ
        raise PlanError("plan file differs from what this build writes; compile the policy again")
    return plan


def _assemble(header: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> Plan:
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
            None if scale is None else HeadScaling(scale, tensors.pop(f"{text}.head_scale.gate")),
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
            refusal=_refusal(item.get("refusal"), tensors.pop(f"gates.{index}.{REFUSAL}", None)),
            window=_window(f"gates.{index}.window", tensors),
            **_beside(f"gates.{index}.beside", tensors),
        )
        for index, item in enumerate(header["gates"])
    )
    if tensors:
        raise PlanError(f"plan file has unknown tensors {sorted(tensors)}; compile the policy again")
    return Plan(
        header["policy_id"],
        header["target_class"],
        ModelSpec(**header["model"]),
        edits,
        gates,
        header["provenance"],
    )


def _refusal(text: str | None, mark: npt.NDArray[Any] | None) -> str | None:
    """The gate's refusal. Mark and text go together; that the mark is 1 shows when the plan is written."""
    if (text is None) != (mark is None):
        raise PlanError("plan file has a gate with half a refusal; compile the policy again")
    return text


def _window(name: str, tensors: dict[str, npt.NDArray[Any]]) -> int | None:
    """The window of a gate, if it has one. `check_plan` judges the number."""
    if name not in tensors:
        return None
    (window,) = tensors.pop(name).tolist()
    if window != int(window):
        raise PlanError(f"{name} = {window}, but must be a whole number of tokens; compile the policy again")
    return int(window)


def _beside(name: str, tensors: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The prompt gate beside a gate, if there is one. `check_plan` judges the numbers."""
    if name not in tensors:
        return {}
    beside, weight = tensors.pop(name).tolist()
    return {"beside": int(beside), "prompt_weight": weight}


def _read_header(data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        raise PlanError(f"plan file has {len(data)} bytes: not a safetensors file")
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise PlanError("plan file is truncated; compile the policy again")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    if METADATA_KEY not in metadata:
        raise PlanError(f"not a plan: the file has no {METADATA_KEY!r} record")
    header = json.loads(metadata[METADATA_KEY])
    if not isinstance(header, dict):
        raise PlanError("plan record is not an object")
    return header
