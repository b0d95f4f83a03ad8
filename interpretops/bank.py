"""The resident plans of one model: fills the tables, lays out each step, proves what the tables hold."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from interpretops.errors import PlanError
from interpretops.plan import MAX_GATES, ModelSpec, Plan, Site, SiteEdits, content_digest
from steering_kernels.ops import GateView, RowEdits, SiteTable, StepMap, TableFullError


class PlanBank:
    """Tables for the sites that plans may edit, a row for each resident revision.

    Not thread-safe against the forward pass: load and unload between passes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        sites: Iterable[Site],
        *,
        rows: int = 64,
        units_per_site: int = 512,
        requests: int = 256,
        device: torch.device | None = None,
    ) -> None:
        device = device or torch.device("cpu")
        self.spec = spec
        self.rows = rows
        self._sites = frozenset(sites)
        self._units_per_site = units_per_site
        self.tables: dict[Site, SiteTable] = {}
        """Made at a site's first use and then kept: most sites of a model are never edited."""
        self.device = device
        self.step = StepMap(requests=requests, gates=MAX_GATES, device=device)
        self.gates_at: dict[Site, list[GateView]] = {}
        """Gates that read at a site, of all resident rows."""
        self._siteless: list[GateView] = []
        self._gates_of: dict[int, list[tuple[Site | None, GateView]]] = {}
        self.row_of: dict[str, int] = {}
        self._sites_of: dict[int, frozenset[Site]] = {}
        self._lock = threading.Lock()

    def load(self, plan: Plan) -> int:
        """Give a plan a row, and return it; a plan that is resident keeps its row.

        Raises `PlanError` if it was compiled for another model, acts at a site without a table, or does
        not fit; nothing has changed then.
        """
        revision = plan.revision
        with self._lock:
            if revision in self.row_of:
                return self.row_of[revision]
            self._check(plan)
            free = sorted(set(range(1, self.rows)) - set(self.row_of.values()))
            if not free:
                raise PlanError(f"table full: {self.rows - 1} revisions are resident; retire one first")
            row = free[0]
            placed: list[Site] = []
            try:
                for site, edits in plan.edits.items():
                    table = self._table(site)
                    table.set_row(row, row_edits(edits, table.width))
                    placed.append(site)
            except TableFullError as error:
                for done in placed:
                    self.tables[done].clear_row(row)
                raise PlanError(f"table full at site {site}: {error}; retire a revision first") from error
            self._gates_of[row] = [
                (gate.site, _gate_view(plan, index, row, self.device))
                for index, gate in enumerate(plan.gates)
                if index > 0
            ]
            self._sites_of[row] = frozenset(plan.edits) | {g.site for g in plan.gates if g.site is not None}
            self.row_of[revision] = row
            self._index_gates()
            return row

    def unload(self, revision: str) -> None:
        """Free the row of a revision; unknown ones are ignored."""
        with self._lock:
            row = self.row_of.pop(revision, None)
            if row is None:
                return
            for table in self.tables.values():
                table.clear_row(row)
            del self._gates_of[row], self._sites_of[row]
            self._index_gates()

    @property
    def active_sites(self) -> frozenset[Site]:
        """Sites at which a resident revision reads or edits."""
        return frozenset().union(*self._sites_of.values())

    def digest(self, revision: str) -> str:
        """sha256 over what the tables hold for a revision; equals ``Plan.digest()`` of an intact plan."""
        row = self.row_of[revision]
        edits = {
            site: {name: _to_numpy(tensor) for name, tensor in table.get_row(row).tensors()}
            for site, table in self.tables.items()
            if row in table.views
        }
        gates = [
            (site, {name: _to_numpy(getattr(gate, name).float()) for name in ("read", "bias", "cut")})
            for site, gate in self._gates_of[row]
        ]
        return content_digest(edits, gates)

    def begin_step(
        self,
        *,
        revisions: Sequence[str | None],
        slots: Sequence[int],
        num_tokens: Sequence[int],
        first_position: Sequence[int],
        prompt_length: Sequence[int],
    ) -> None:
        """Lay out the coming forward pass, one entry per request; revision None passes through.

        Raises KeyError for a revision that is not resident: the caller must not run the pass.
        """
        self.step.begin(
            rows=[0 if revision is None else self.row_of[revision] for revision in revisions],
            slots=slots,
            num_tokens=num_tokens,
            first_position=first_position,
            prompt_length=prompt_length,
        )
        if self.step.active and self._siteless:
            from steering_kernels.ops import update_gates

            update_gates(torch.zeros(self.step.num_tokens, 0, device=self.device), self._siteless, self.step)

    def _check(self, plan: Plan) -> None:
        if plan.model.fingerprint != self.spec.fingerprint:
            raise PlanError(
                f"plan {plan.policy_id!r} was compiled for {plan.model.name} "
                f"({plan.model.fingerprint[:12]}), but this model is {self.spec.name} "
                f"({self.spec.fingerprint[:12]}); compile the policy against it"
            )
        for site in plan.edits:
            if site not in self._sites:
                raise PlanError(
                    f"plan {plan.policy_id!r} edits at {site}, but this engine has no table there"
                )

    def _table(self, site: Site) -> SiteTable:
        if site not in self.tables:
            self.tables[site] = SiteTable(
                self.spec.width(site.point),
                read_width=self.spec.read_width(site.point),
                rows=self.rows,
                units=self._units_per_site,
                scales=self.rows if site.point == "attn_z" else 0,
                device=self.device,
            )
        return self.tables[site]

    def _index_gates(self) -> None:
        self.gates_at = {}
        self._siteless = []
        for gates in self._gates_of.values():
            for site, view in gates:
                if site is None:
                    self._siteless.append(view)
                else:
                    self.gates_at.setdefault(site, []).append(view)


def row_edits(edits: SiteEdits, width: int) -> RowEdits:
    """A site's edits of a plan as the op's tensors."""
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


def _gate_view(plan: Plan, index: int, row: int, device: torch.device) -> GateView:
    gate = plan.gates[index]
    return GateView(
        row=row,
        index=index,
        read=torch.from_numpy(gate.read.copy()).double().to(device),
        bias=torch.from_numpy(gate.bias.copy()).double().to(device),
        cut=torch.from_numpy(gate.cut.copy()).double().to(device),
        require_all=gate.combine == "all",
        prompt_end=gate.scope == "prompt_end",
        latched=gate.latched,
        phase=gate.phase,
        max_norm=gate.max_norm,
    )


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
