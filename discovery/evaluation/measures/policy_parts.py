"""The parts of a policy that can be taken out one by one: rows, heads, features, vectors."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from interpretops.artifacts import Artifacts
from interpretops.plan import HeadScaling, Plan, Site
from interpretops.policy import (
    DirectionAblation,
    FeatureClamp,
    FeatureScale,
    LoraGate,
    Policy,
    SteeringVector,
)


@dataclass(frozen=True)
class Part:
    """One rank-one edit of a plan, or one head that it scales."""

    name: str
    """Where it is and what, in words."""
    site: Site
    unit: int | None = None
    """Its row among the site's units."""
    scale: tuple[int, int] | None = None
    """Of a head: the row among the site's head scales, and the head."""


def parts_of(policy: Policy, plan: Plan, artifacts: Path) -> list[Part]:
    """Every part of a policy, in the order of the forward pass."""
    names = _unit_names(policy, plan, artifacts)
    parts: list[Part] = []
    for site in sorted(plan.edits, key=lambda site: site.order):
        edits, known = plan.edits[site], names.get(site, [])
        assert len(known) == len(edits.units), f"{site} has {len(edits.units)} units, but {len(known)} names"
        parts += [Part(f"{site}, {name}", site, unit=index) for index, name in enumerate(known)]
        if edits.head_scale is not None:
            heads = edits.head_scale.delta.reshape(-1, plan.model.num_heads, plan.model.head_dim).any(axis=-1)
            parts += [
                Part(f"{site}, head {head}", site, scale=(int(row), int(head)))
                for row, head in np.argwhere(heads)
            ]
    return parts


def _unit_names(policy: Policy, plan: Plan, artifacts: Path) -> dict[Site, list[str]]:
    """What each unit of a site is, in the order in which `compile_policy` adds them."""
    names: dict[Site, list[str]] = {}
    opened = Artifacts(artifacts, plan.model)
    for edit in policy.interventions:
        if isinstance(edit, FeatureScale | FeatureClamp):
            site = Site(edit.selector.layer, edit.selector.point)
            of = f" of {edit.selector.dictionary}" if edit.selector.dictionary else ""
            names.setdefault(site, []).extend(
                f"feature {feature}{of}" for feature in edit.selector.sae_feature_ids
            )
        elif isinstance(edit, SteeringVector | DirectionAblation):
            what = "steering vector" if isinstance(edit, SteeringVector) else "removed direction"
            given = edit.vector.tensor or edit.vector.file or f"feature {edit.vector.feature}"
            for layer in edit.selector.all_layers:
                names.setdefault(Site(layer, edit.selector.point), []).append(f"{what} {given}")
        elif isinstance(edit, LoraGate):
            adapter = opened.adapter(edit.adapter, policy.meta.target_class)
            for site in adapter.sites:
                wanted = edit.selector.layers is None or site.layer in edit.selector.layers
                if wanted and site.point in edit.selector.points:
                    rows = len(adapter.sites[site].read)
                    names.setdefault(site, []).extend(
                        f"row {row} of {adapter.manifest.id}" for row in range(rows)
                    )
    return names


def without_part(plan: Plan, part: Part) -> Plan:
    """The plan with a part that does nothing; all else, gates included, is as it was."""
    edits = plan.edits[part.site]
    if part.unit is not None:
        write = edits.units.write.copy()
        write[part.unit] = 0
        changed = replace(edits, units=replace(edits.units, write=write))
    else:
        assert part.scale is not None
        assert edits.head_scale is not None
        row, head = part.scale
        delta = edits.head_scale.delta.copy()
        delta[row, head * plan.model.head_dim : (head + 1) * plan.model.head_dim] = 0
        changed = replace(edits, head_scale=HeadScaling(delta, edits.head_scale.gate))
    return replace(plan, edits={**plan.edits, part.site: changed})
