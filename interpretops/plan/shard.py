"""A rank's part of a plan under tensor parallelism: heads are split over ranks, the rest is replicated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from interpretops.errors import PlanError
from interpretops.plan import HEAD_POINTS, Array, Gate, ModelSpec, Plan, Site, SiteEdits


@dataclass(frozen=True)
class Shard:
    """Rank ``index`` of ``count``; every rank has the same number of adjacent heads."""

    index: int = 0
    count: int = 1

    def of_model(self, spec: ModelSpec) -> ModelSpec:
        """The model spec with the widths of the rank's activations."""
        return replace(spec, num_heads=spec.num_heads // self.count)

    def of_plan(self, plan: Plan) -> Plan:
        """The rank's part of a plan. The rank attests its `digest`; its `revision` names nothing.

        At ``attn_z``, reads, writes and head scales keep only the rank's columns. At ``attn_proj``, whose
        output is complete on each rank, only reads are cut. Raises `PlanError` for a prompt gate there.
        """
        if self.count == 1:
            return plan
        for gate in plan.gates:
            split = [str(part.site) for part in gate.probe if part.site.point in HEAD_POINTS]
            if split:
                raise PlanError(
                    f"plan {plan.policy_id!r} has an attention probe that reads at {split}, where "
                    f"{self.count} tensor-parallel ranks split the heads; use another point, or one rank"
                )
        spec = self.of_model(plan.model)
        width = spec.num_heads * spec.head_dim
        own = slice(self.index * width, (self.index + 1) * width)

        def cut(array: Array) -> Array:
            return array[:, own]

        return replace(
            plan,
            model=spec,
            edits={site: _edits(site, edits, cut) for site, edits in plan.edits.items()},
            gates=tuple(_gate(gate, cut) for gate in plan.gates),
        )


def _edits(site: Site, edits: SiteEdits, cut: Callable[[Array], Array]) -> SiteEdits:
    if site.point not in HEAD_POINTS:
        return edits
    units, scale, topk = edits.units, edits.head_scale, edits.topk
    writes = cut(units.write) if site.point == "attn_z" else units.write
    return SiteEdits(
        replace(units, read=cut(units.read), write=writes),
        None if scale is None else replace(scale, delta=cut(scale.delta)),
        None if topk is None else replace(topk, read=cut(topk.read)),
    )


def _gate(gate: Gate, cut: Callable[[Array], Array]) -> Gate:
    if gate.site is None or gate.site.point not in HEAD_POINTS:
        return gate
    return replace(gate, read=cut(gate.read))
