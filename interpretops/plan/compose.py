"""Composes several plans into one that does what all of them do, if the result is unambiguous."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from interpretops.errors import PlanError
from interpretops.plan import MAX_GATES, Gate, HeadScaling, IntArray, Plan, Site, SiteEdits
from interpretops.plan.check import check_plan

SEPARATOR = "+"
"""Joins the policy ids in a composed plan's id; no policy id contains it."""


def compose_plans(plans: Sequence[Plan]) -> Plan:
    """One plan with the edits and gates of all ``plans``, in the order of their ids.

    The plans must edit different sites. Then each acts on the output of those at earlier sites. At the same
    site changes would add up: two policies that each remove a direction would together reverse it. Raises
    `PlanError` for such plans, and for more than `MAX_GATES` gates in total.
    """
    parts = sorted(plans, key=lambda plan: plan.policy_id)
    ids = [plan.policy_id for plan in parts]
    name = SEPARATOR.join(ids)
    if len(set(ids)) != len(ids):
        raise PlanError(f"policies {name} cannot be composed: one of them appears twice")
    if len({plan.model for plan in parts}) != 1:
        raise PlanError(f"policies {name} cannot be composed: they are compiled for different models")
    edits: dict[Site, SiteEdits] = {}
    owner: dict[Site, str] = {}
    gates: list[Gate] = [parts[0].gates[0]]
    for plan in parts:
        shift = len(gates) - 1
        gates.extend(
            gate if gate.beside is None else replace(gate, beside=gate.beside + shift)
            for gate in plan.gates[1:]
        )
        for site, here in plan.edits.items():
            if site in owner:
                raise PlanError(
                    f"policies {owner[site]!r} and {plan.policy_id!r} cannot be composed: both edit {site}, "
                    "where changes add up; bind one of them, or write one policy with the edits of both"
                )
            owner[site] = plan.policy_id
            edits[site] = _shifted(here, shift)
    if len(gates) > MAX_GATES:
        raise PlanError(
            f"policies {name} cannot be composed: together they have {len(gates)} gates, but at most "
            f"{MAX_GATES} are allowed"
        )
    composed = Plan(
        policy_id=name,
        target_class=SEPARATOR.join(sorted({plan.target_class for plan in parts})),
        model=parts[0].model,
        edits=edits,
        gates=tuple(gates),
        provenance={"composed": {plan.policy_id: plan.revision for plan in parts}},
    )
    check_plan(composed)
    return composed


def _shifted(here: SiteEdits, shift: int) -> SiteEdits:
    scale = here.head_scale
    return SiteEdits(
        replace(here.units, gate=_shift(here.units.gate, shift)),
        None if scale is None else HeadScaling(scale.delta, _shift(scale.gate, shift)),
        here.topk,
    )


def _shift(gate: IntArray, shift: int) -> IntArray:
    """Renumber gates: gate 0, always open, is shared; the others follow those of the earlier plans."""
    return np.where(gate == 0, 0, gate + shift).astype(np.int32)
