"""The op as PyTorch's compiler sees it: one opaque call per site, independent of the loaded plans.

Rows, gates and the batch layout are read when the call runs. Piecewise graphs are split at it (`SITE_OP` is
one of vLLM's splitting ops), so that it runs between two captured pieces. A graph of the whole model may
contain it only while its owner is `capturing`, as a kernel that reads the tables at replay. Captured at any
other time it would repeat the edits of one step forever, so it raises.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor

SITE_OP = "interpretops::edit_site"


class SiteRunner(Protocol):
    """Runs a model's edit sites, by number."""

    capturing: bool

    def run_at(self, number: int, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        """Edit ``hidden`` in place; ``residual`` and ``source`` as in `apply_edits`."""


_LIBRARY = torch.library.Library("interpretops", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "edit_site(Tensor(a!) hidden, Tensor? residual, Tensor? source, int number) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_OWNER: list[weakref.ReferenceType[SiteRunner]] = []
"""The model whose sites the op runs. Compiled code is cached on disk for other processes, so it cannot name
it."""


def claim_site_op(owner: SiteRunner) -> None:
    """Make the op run this model's sites. Raises RuntimeError while another compiled model owns it."""
    if _OWNER and _OWNER[0]() not in (None, owner):
        raise RuntimeError(
            "a process can steer only one compiled model; start the other with --enforce-eager"
        )
    _OWNER[:] = [weakref.ref(owner)]


def edit_site(hidden: Tensor, residual: Tensor | None, source: Tensor | None, number: int) -> None:
    """Run the op at a site through PyTorch's dispatcher; traced models call this."""
    torch.ops.interpretops.edit_site(hidden, residual, source, number)


def _run(hidden: Tensor, residual: Tensor | None, source: Tensor | None, number: int) -> None:
    owner = _OWNER[0]() if _OWNER else None
    if owner is None:
        raise RuntimeError(f"{SITE_OP}: no steered model is registered in this process")
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing() and not owner.capturing:
        raise RuntimeError(
            f"{SITE_OP} was about to be captured in a CUDA graph, which would repeat the edits of one step; "
            "use cudagraph_mode PIECEWISE, or NONE"
        )
    owner.run_at(number, hidden, residual, source)


def _trace(hidden: Tensor, residual: Tensor | None, source: Tensor | None, number: int) -> None:
    """Returns nothing: ``hidden`` is written in place."""


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("edit_site", _run, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake(SITE_OP, _trace, lib=_LIBRARY)
