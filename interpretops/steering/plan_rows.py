"""Converts a plan's numbers to the op's inputs: a row's edits at a site, and its gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from interpretops.plan import PROBE_FIELDS, Plan, Site, SiteEdits
from steering_kernels.ops import GateView, ProbeHeads, RowEdits, SumRanks


def row_edits(edits: SiteEdits, width: int) -> RowEdits:
    """A plan's edits at a site as the op's tensors."""
    units, scale, topk = edits.units, edits.head_scale, edits.topk
    return RowEdits(
        **{
            name: torch.from_numpy(getattr(units, name).copy())
            for name in ("read", "write", "bias", "threshold", "gain", "offset", "low", "high", "max_norm")
        },
        gate=torch.from_numpy(units.gate.copy()),
        topk=torch.from_numpy(units.topk.copy()),
        scale=torch.zeros(0, width) if scale is None else torch.from_numpy(scale.delta.copy()),
        scale_gate=torch.zeros(0, dtype=torch.int32)
        if scale is None
        else torch.from_numpy(scale.gate.copy()),
        topk_read=None if topk is None else torch.from_numpy(topk.read.copy()),
        topk_bias=None if topk is None else torch.from_numpy(topk.bias.copy()),
        topk_k=0 if topk is None else topk.k,
    )


def gate_views(
    plan: Plan, row: int, device: torch.device, sum_at: Callable[[Site | None], SumRanks | None]
) -> list[tuple[Site | None, GateView]]:
    """A plan's gates except the always-open one, each with its site; a probe has one view per part."""
    found: list[tuple[Site | None, GateView]] = []
    column = 0
    for index, gate in enumerate(plan.gates[1:], start=1):
        numbers = {name: torch.from_numpy(array.copy()).double() for name, array in gate.tensors.items()}
        numbers = {name: tensor.to(device) for name, tensor in numbers.items()}
        heads: list[ProbeHeads] = []
        for part in gate.probe:
            own = {name: numbers[f"{part.site}.{name}"] for name in PROBE_FIELDS}
            before = tuple((other.column, len(other.bias)) for other in heads)
            last = part is gate.probe[-1]
            summed = (*before, (column, len(part.bias))) if last else ()
            heads.append(
                ProbeHeads(**own, max_norm=part.max_norm, column=column, summed=summed, window=gate.window)
            )
            column += 2 * len(part.bias)
        places: list[tuple[Site | None, ProbeHeads | None]] = [(gate.site, None)]
        if gate.probe:
            places = [(part.site, own_heads) for part, own_heads in zip(gate.probe, heads, strict=True)]
        for site, probe in places:
            view = GateView(
                row=row,
                index=index,
                read=numbers["read"],
                bias=numbers["bias"],
                cut=numbers["cut"],
                require_all=gate.combine == "all",
                prompt_end=gate.scope in ("prompt_end", "prompt"),
                latched=gate.latched,
                phase=gate.phase,
                max_norm=gate.max_norm,
                probe=probe,
                refusal=gate.refusal is not None,
                answer=gate.scope == "answer",
                beside=gate.beside,
                prompt_weight=gate.prompt_weight,
                sum_ranks=sum_at(site),
            )
            found.append((site, view))
    # A gate beside another needs its reading, also where both read at one site.
    return sorted(found, key=lambda item: item[1].answer)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """Copy a tensor to the host."""
    return tensor.detach().cpu().numpy()
