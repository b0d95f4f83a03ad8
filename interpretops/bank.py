"""The resident plans of one model: fills the tables, lays out each step, proves what the tables hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from interpretops.errors import PlanError
from interpretops.plan import (
    HEAD_POINTS,
    MAX_GATES,
    PROBE_FIELDS,
    ModelSpec,
    Plan,
    Site,
    SiteEdits,
    content_digest,
)
from steering_kernels.ops import (
    MEMORY_COLUMNS,
    GateView,
    ProbeHeads,
    PromptPart,
    RowEdits,
    SiteTable,
    StepMap,
    SumRanks,
    TableFullError,
    new_memory,
)

SlotsOf = Callable[[int, int], npt.NDArray[np.int64]]
"""Memory slots of the first so many tokens of the request at a place in the batch."""


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
        sum_ranks: SumRanks | None = None,
    ) -> None:
        """``sum_ranks``: this bank has a rank's shards, of the model and of plans (`interpretops.shard`)."""
        device = device or torch.device("cpu")
        self.spec = spec
        self.rows = rows
        self._sites = frozenset(sites)
        self._units_per_site = units_per_site
        self._sum_ranks = sum_ranks
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
        self._reads_prompts: frozenset[int] = frozenset()
        """Rows with a gate that reads whole prompts."""
        self._lock = threading.Lock()

    def load(self, plan: Plan, revision: str | None = None) -> int:
        """Give a plan a row, and return it; a plan that is resident keeps its row.

        A shard of a plan comes with the ``revision`` of the whole.
        Raises `PlanError` if it was compiled for another model, acts at a site without a table, or does
        not fit; nothing has changed then.
        """
        revision = plan.revision if revision is None else revision
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
            self._gates_of[row] = _gate_views(plan, row, self.device, self._sum_at)
            self._sites_of[row] = frozenset(plan.edits) | {s for s, _ in self._gates_of[row] if s is not None}
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
        gates: dict[int, tuple[Site | None, dict[str, npt.NDArray[np.float32]]]] = {}
        for site, gate in self._gates_of[row]:
            held = {name: getattr(gate, name) for name in ("read", "bias", "cut")}
            if gate.probe is not None:
                held |= {f"{site}.{name}": getattr(gate.probe, name) for name in PROBE_FIELDS}
            earlier = gates.get(gate.index, (None, {}))[1]
            gates[gate.index] = (site, earlier | {name: _to_numpy(held[name].float()) for name in held})
        return content_digest(edits, list(gates.values()))

    def begin_step(
        self,
        *,
        revisions: Sequence[str | None],
        slots: Sequence[int],
        num_tokens: Sequence[int],
        first_position: Sequence[int],
        prompt_length: Sequence[int],
        memory_slots: SlotsOf | None = None,
    ) -> None:
        """Lay out the coming forward pass, one entry per request; revision None passes through.

        ``memory_slots`` is asked only for prompts that a gate reads whole; they need `keep_memory` before.
        Raises KeyError for a revision that is not resident: the caller must not run the pass.
        """
        rows = [0 if revision is None else self.row_of[revision] for revision in revisions]
        self.step.begin(
            rows=rows,
            slots=slots,
            num_tokens=num_tokens,
            first_position=first_position,
            prompt_length=prompt_length,
        )
        if self._reads_prompts.intersection(rows):
            first = 0
            for place, (row, begin, count) in enumerate(zip(rows, first_position, num_tokens, strict=True)):
                end = min(begin + count, prompt_length[place])
                if row in self._reads_prompts and begin < end:
                    if memory_slots is None:
                        raise RuntimeError("a gate reads whole prompts, but nobody says where they are kept")
                    kept = torch.from_numpy(memory_slots(place, end)).to(self.device)
                    ends = end == prompt_length[place]
                    self.step.prompts.append(PromptPart(row, first, kept, end - begin, ends))
                first += count
        if self.step.active and self._siteless:
            from steering_kernels.ops import update_gates

            update_gates(torch.zeros(self.step.num_tokens, 0, device=self.device), self._siteless, self.step)

    def keep_memory(self, slots: int) -> None:
        """Have room for what gates keep of so many prompt tokens; what is kept already stays."""
        if self.step.memory is None or len(self.step.memory) < slots:
            larger = new_memory(slots, self.device)
            if self.step.memory is not None:
                larger[: len(self.step.memory)] = self.step.memory
            self.step.memory = larger

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
        heads = sum(len(part.bias) for gate in plan.gates for part in gate.probe)
        if 2 * heads > MEMORY_COLUMNS:
            raise PlanError(
                f"plan {plan.policy_id!r} has attention probes of {heads} heads together, but at most "
                f"{MEMORY_COLUMNS // 2} are kept"
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
                sum_ranks=self._sum_at(site),
            )
        return self.tables[site]

    def _sum_at(self, site: Site | None) -> SumRanks | None:
        """What is read at the heads' points is split over ranks; elsewhere each rank has all of it."""
        return self._sum_ranks if site is not None and site.point in HEAD_POINTS else None

    def _index_gates(self) -> None:
        self.gates_at = {}
        self._siteless = []
        self._reads_prompts = frozenset(
            row for row, gates in self._gates_of.items() if any(view.probe for _, view in gates)
        )
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


def _gate_views(
    plan: Plan, row: int, device: torch.device, sum_at: Callable[[Site | None], SumRanks | None]
) -> list[tuple[Site | None, GateView]]:
    """The gates of a plan but the always-open one, each with its site; probes have one view for each part."""
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
            heads.append(ProbeHeads(**own, max_norm=part.max_norm, column=column, summed=summed))
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
                prompt_end=gate.scope != "token",
                latched=gate.latched,
                phase=gate.phase,
                max_norm=gate.max_norm,
                probe=probe,
                sum_ranks=sum_at(site),
            )
            found.append((site, view))
    return found


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
