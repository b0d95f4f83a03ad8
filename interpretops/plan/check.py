"""Checks that a plan is complete, finite and consistent, before anything uses it."""

from dataclasses import fields
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from interpretops.errors import PlanError
from interpretops.plan.edits import INT_FIELDS, UNIT_FIELDS, SiteEdits
from interpretops.plan.gates import (
    MAX_ANSWER_WINDOW,
    MAX_GATES,
    MAX_WINDOW,
    PROBE_SCOPES,
    Combine,
    Gate,
    Phase,
    ProbePart,
    Scope,
)
from interpretops.plan.plan import Plan
from interpretops.plan.sites import ModelSpec, Site


def check_plan(plan: Plan) -> None:
    """Raise `PlanError` at the first fault."""
    _check_model(plan.model)
    for name in ("policy_id", "target_class"):
        if not isinstance(getattr(plan, name), str):
            raise PlanError(f"{name} = {getattr(plan, name)!r}, but must be a string")
    if not isinstance(plan.provenance, dict):
        raise PlanError("provenance must be an object")
    if not 1 <= len(plan.gates) <= MAX_GATES:
        raise PlanError(f"plan has {len(plan.gates)} gates, but must have 1..{MAX_GATES}")
    if len(plan.gates[0]) or plan.gates[0].phase != "both" or plan.gates[0].latched:
        raise PlanError("gates[0] must be the always-open gate")
    for index, gate in enumerate(plan.gates):
        _check_gate(gate, f"gates[{index}]", plan.model)
        _check_answer_gate(gate, f"gates[{index}]", plan.gates)
    for site, edits in plan.edits.items():
        if site.layer >= plan.model.num_layers:
            raise PlanError(f"site {site}, but {plan.model.name} has layers 0..{plan.model.num_layers - 1}")
        _check_edits(site, edits, plan.model, plan.gates)


def _check_answer_gate(gate: Gate, where: str, gates: tuple[Gate, ...]) -> None:
    if gate.scope != "answer":
        if gate.beside is not None or gate.prompt_weight:
            raise PlanError(f"{where}.beside = {gate.beside!r}, but only a gate of scope answer has it")
        return
    if gate.window is None or not 1 <= gate.window <= MAX_ANSWER_WINDOW:
        raise PlanError(f"{where}.window = {gate.window!r}, but must be 1..{MAX_ANSWER_WINDOW} for an answer")
    if gate.refusal is not None:
        raise PlanError(f"{where}: a gate of scope answer opens too late to mean a refusal")
    if not gate.latched or gate.phase == "prefill":
        raise PlanError(f"{where}: a gate of scope answer must be latched, and act on the answer")
    if gate.beside is None:
        if gate.prompt_weight:
            raise PlanError(f"{where}.prompt_weight = {gate.prompt_weight!r}, but no gate stands beside it")
        return
    if not 1 <= gate.beside < len(gates) or gates[gate.beside].scope != "prompt":
        raise PlanError(f"{where}.beside = {gate.beside!r}, but must be the index of a gate of scope prompt")
    prompt = gates[gate.beside]
    if prompt.site is None or gate.site is None or prompt.site.order > gate.site.order:
        raise PlanError(f"{where}.beside: the prompt gate reads at {prompt.site}, after {gate.site}")


def _check_model(model: ModelSpec) -> None:
    for item in fields(model):
        value = getattr(model, item.name)
        if item.type in (int, "int"):
            if type(value) is not int or value < 1:
                raise PlanError(f"model.{item.name} = {value!r}, but must be a positive integer")
        elif not isinstance(value, str):
            raise PlanError(f"model.{item.name} = {value!r}, but must be a string")


def _check_gate(gate: Gate, where: str, model: ModelSpec) -> None:
    conditions = len(gate)
    if (
        gate.combine not in get_args(Combine)
        or gate.scope not in get_args(Scope)
        or gate.phase not in get_args(Phase)
        or not isinstance(gate.latched, bool)
    ):
        raise PlanError(f"{where}: unknown combine, scope, phase or latched")
    if (gate.site is None) != (conditions == 0 and not gate.probe):
        raise PlanError(f"{where}: a gate reads at a site exactly when it has conditions or a probe")
    if (gate.scope in PROBE_SCOPES) != bool(gate.probe) or (gate.probe and conditions):
        raise PlanError(
            f"{where}: a gate has an attention probe, and nothing else, when its scope is prompt or answer"
        )
    if gate.refusal is not None and (not isinstance(gate.refusal, str) or not gate.refusal.strip()):
        raise PlanError(f"{where}.refusal = {gate.refusal!r}, but must be the text that clients get")
    if gate.refusal is not None and gate.site is None:
        raise PlanError(f"{where}: a gate without conditions is always open, so it cannot mean a refusal")
    if gate.window is not None and not gate.probe:
        raise PlanError(f"{where}.window = {gate.window!r}, but only an attention probe reads in windows")
    if gate.window is not None and (type(gate.window) is not int or not 1 <= gate.window <= MAX_WINDOW):
        raise PlanError(f"{where}.window = {gate.window!r}, but must be 1..{MAX_WINDOW} tokens")
    for part in gate.probe:
        _check_probe_part(part, where, gate, model)
    if gate.site is not None and not gate.probe:
        width = model.width(gate.site.point)
        if gate.site.point == "attn_proj":
            raise PlanError(f"{where}: reads at attn_proj, which is not an activation; use attn_z")
        if gate.site.layer >= model.num_layers or gate.read.shape != (conditions, width):
            raise PlanError(f"{where}: read {gate.read.shape} at {gate.site} does not fit {model.name}")
    cuts = 1 if gate.probe else conditions
    if gate.bias.shape != (conditions,) or gate.cut.shape != (cuts,):
        raise PlanError(f"{where}: bias must have {conditions} entries and cut {cuts}")
    for name, array in gate.tensors.items():
        _expect(f"{where}.{name}", array, np.float32)
    if not gate.max_norm > 0:
        raise PlanError(f"{where}.max_norm = {gate.max_norm}, but must be positive")


def _check_probe_part(part: ProbePart, where: str, gate: Gate, model: ModelSpec) -> None:
    width, heads = model.width(part.site.point), part.bias.shape[0]
    places = [other.site.order for other in gate.probe]
    if places != sorted(set(places)) or gate.probe[-1].site != gate.site:
        raise PlanError(
            f"{where}: a probe's parts must be in site order, and the last must be at the gate's site"
        )
    if part.site.point == "attn_proj" or part.site.layer >= model.num_layers or heads < 1:
        raise PlanError(f"{where}: a probe of {heads} heads at {part.site} does not fit {model.name}")
    if not part.query.shape == part.read.shape == (heads, width) or not part.max_norm > 0:
        raise PlanError(
            f"{where}: query {part.query.shape}, read {part.read.shape} or max_norm {part.max_norm} at "
            f"{part.site} does not fit {heads} heads and {model.name}"
        )


def _check_edits(site: Site, edits: SiteEdits, model: ModelSpec, gates: tuple[Gate, ...]) -> None:
    units, rank = edits.units, len(edits.units)
    width, read_width = model.width(site.point), model.read_width(site.point)
    shapes = {"read": (rank, read_width), "write": (rank, width)}
    for name in UNIT_FIELDS:
        array = getattr(units, name)
        shape = shapes.get(name, (rank,))
        if array.shape != shape:
            raise PlanError(f"{site}.{name} has shape {array.shape}, but must have {shape}")
        infinite = name in ("threshold", "low", "high", "max_norm")
        _expect(f"{site}.{name}", array, np.int32 if name in INT_FIELDS else np.float32, infinite=infinite)
    if np.any(units.low > units.high) or np.any(units.max_norm <= 0):
        raise PlanError(f"{site}: low must not exceed high, and max_norm must be positive")
    features = 0 if edits.topk is None else edits.topk.read.shape[0]
    if np.any(units.topk < -1) or np.any(units.topk >= features):
        raise PlanError(f"{site}.topk names a feature outside 0..{features - 1}")
    if edits.topk is not None:
        _expect(f"{site}.topk.read", edits.topk.read, np.float32)
        _expect(f"{site}.topk.bias", edits.topk.bias, np.float32)
        fits = edits.topk.read.shape == (features, read_width) and edits.topk.bias.shape == (features,)
        if not fits or not 1 <= edits.topk.k <= features:
            raise PlanError(f"{site}.topk: shapes or k = {edits.topk.k} do not fit {features} features")
    named = set(units.gate.tolist())
    if edits.head_scale is not None:
        scale = edits.head_scale
        _expect(f"{site}.head_scale.delta", scale.delta, np.float32)
        _expect(f"{site}.head_scale.gate", scale.gate, np.int32)
        if site.point != "attn_z" or scale.delta.shape != (len(scale.gate), width):
            raise PlanError(f"{site}.head_scale: head scales act at attn_z, with one row of {width} per gate")
        named |= set(scale.gate.tolist())
    for index in named:
        if not 0 <= index < len(gates):
            raise PlanError(f"{site}: gate {index}, but the plan has gates 0..{len(gates) - 1}")
        reads_at = gates[index].site
        if reads_at is not None and reads_at.order > site.order:
            raise PlanError(f"{site}: gate {index} reads at {reads_at}, which comes after the edit")


def _expect(name: str, array: npt.NDArray[Any], dtype: type, *, infinite: bool = False) -> None:
    if array.dtype != dtype:
        raise PlanError(f"{name} has dtype {array.dtype}, but must have {np.dtype(dtype)}")
    bad = np.isnan(array).any() if infinite else not np.isfinite(array).all()
    if bad:
        raise PlanError(f"{name} holds a value that is not {'a number' if infinite else 'finite'}")
