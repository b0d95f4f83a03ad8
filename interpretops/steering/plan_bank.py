"""The resident plans of one model: fills the tables, prepares each step, and attests the tables."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from interpretops.errors import NoRoomError, PlanError
from interpretops.plan import (
    HEAD_POINTS,
    MAX_GATES,
    PROBE_FIELDS,
    ModelSpec,
    Plan,
    Point,
    Site,
    content_digest,
)
from interpretops.plan.gates import REFUSAL, REFUSAL_MARK
from interpretops.steering.plan_rows import gate_views, row_edits, to_numpy
from steering_kernels.ops import (
    MEMORY_COLUMNS,
    AnswerTokens,
    GateView,
    PromptPart,
    SiteTable,
    StepMap,
    SumRanks,
    TableFullError,
    apply_edits,
    new_memory,
    update_gates,
)

SlotsOf = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], Tensor]
"""[N, P] int64: memory slots of tokens, from batch indices [N, 1] and positions [N, P] or [1, P]."""


class PlanBank:
    """Tables for the sites that plans may edit, with one row per resident revision.

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
        graph_tokens: int = 0,
    ) -> None:
        """``sum_ranks``: this bank has one rank's shards of model and plans (`interpretops.plan.shard`).

        ``graph_tokens``: tokens of the largest CUDA graph that contains the op. If given, all tables are
        created at once, because a graph keeps their addresses.
        """
        device = device or torch.device("cpu")
        self.spec = spec
        self.rows = rows
        self._sites = frozenset(sites)
        self._units_per_site = units_per_site
        self._sum_ranks = sum_ranks
        self.tables: dict[Site, SiteTable] = {}
        """Created at a site's first use and then kept, because most sites are never edited."""
        self.device = device
        self.step = StepMap(requests=requests, gates=MAX_GATES, device=device, graph_tokens=graph_tokens)
        self.gates_at: dict[Site, list[GateView]] = {}
        """Gates that read at a site, of all resident rows."""
        self._siteless: list[GateView] = []
        self._gates_of: dict[int, list[tuple[Site | None, GateView]]] = {}
        self.row_of: dict[str, int] = {}
        self._sites_of: dict[int, frozenset[Site]] = {}
        self._reads_prompts: frozenset[int] = frozenset()
        """Rows with a gate that reads whole prompts."""
        self._answer_window: dict[int, int] = {}
        """Rows with a gate that reads answers, and the most tokens that it reads at once."""
        self._replayable: dict[int, bool] = {}
        """Rows that act in replayed graphs, and whether only after the prompt."""
        self._lock = threading.Lock()
        if graph_tokens:
            for site in sorted(self._sites, key=lambda site: site.order):
                self._table(site)

    def load(self, plan: Plan, revision: str | None = None) -> int:
        """Load a plan into a row and return the row; a resident plan keeps its row.

        For a shard, pass the ``revision`` of the whole plan.
        Raises `PlanError`, and changes nothing, if the plan was compiled for another model, acts at a site
        without a table, or does not fit.
        """
        revision = plan.revision if revision is None else revision
        with self._lock:
            if revision in self.row_of:
                return self.row_of[revision]
            self._check(plan)
            free = sorted(set(range(1, self.rows)) - set(self.row_of.values()))
            if not free:
                raise NoRoomError(f"table full: {self.rows - 1} revisions are resident; retire one first")
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
                raise NoRoomError(f"table full at site {site}: {error}; retire a revision first") from error
            self._gates_of[row] = gate_views(plan, row, self.device, self._sum_at)
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

    def may_replay(self, revisions: Sequence[str | None], in_prompt: Sequence[bool]) -> bool:
        """Whether a captured graph applies every request's revision correctly in this pass.

        A graph contains the edits but no gates, so each gate must be decided before the pass: by its phase or
        its latch. ``in_prompt``: whether a request's tokens in the pass belong to its prompt.
        """
        for revision, prompt in zip(revisions, in_prompt, strict=True):
            if revision is not None:
                past_prompt = self._replayable.get(self.row_of[revision])
                if past_prompt is None or (past_prompt and prompt):
                    return False
        return True

    def decide_gates(self) -> None:
        """Open the latched gates before a pass for which `may_replay` holds."""
        if not self.step.active:
            return
        nothing = torch.zeros(self.step.num_tokens, 0, device=self.device)
        for gates in self.gates_at.values():
            update_gates(nothing, gates, self.step)

    @property
    def active_sites(self) -> frozenset[Site]:
        """Sites at which a resident revision reads or edits."""
        return frozenset().union(*self._sites_of.values())

    def digest(self, revision: str) -> str:
        """sha256 over a revision's numbers in the tables; equals ``Plan.digest()`` of an intact plan."""
        row = self.row_of[revision]
        edits = {
            site: {name: to_numpy(tensor) for name, tensor in table.get_row(row).tensors()}
            for site, table in self.tables.items()
            if row in table.views
        }
        gates: dict[int, tuple[Site | None, dict[str, npt.NDArray[np.float32]]]] = {}
        for site, gate in self._gates_of[row]:
            held = {name: getattr(gate, name) for name in ("read", "bias", "cut")}
            if gate.probe is not None:
                held |= {f"{site}.{name}": getattr(gate.probe, name) for name in PROBE_FIELDS}
                if gate.probe.window is not None:
                    held["window"] = torch.tensor([gate.probe.window])
            if gate.refusal:
                held[REFUSAL] = torch.from_numpy(REFUSAL_MARK)
            if gate.beside is not None:
                held["beside"] = torch.tensor([gate.beside, gate.prompt_weight])
            earlier = gates.get(gate.index, (None, {}))[1]
            gates[gate.index] = (site, earlier | {name: to_numpy(held[name].float()) for name in held})
        return content_digest(edits, [gates[index] for index in sorted(gates)])

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
        """Prepare the next forward pass, with one entry per request; revision None is pass-through.

        ``memory_slots`` is called only for prompts that a gate reads whole; call `keep_memory` first.
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
                    at = np.array([[place]]), np.arange(end)[None]
                    kept = memory_slots(*at)[0].to(self.device)
                    ends = end == prompt_length[place]
                    self.step.prompts.append(PromptPart(row, first, kept, end - begin, ends))
                first += count
        for row in set(rows) & set(self._answer_window):
            self._lay_out_answers(row, rows, num_tokens, first_position, prompt_length, memory_slots)
        if self.step.active and self._siteless:
            update_gates(torch.zeros(self.step.num_tokens, 0, device=self.device), self._siteless, self.step)

    def _lay_out_answers(
        self,
        row: int,
        rows: Sequence[int],
        num_tokens: Sequence[int],
        first_position: Sequence[int],
        prompt_length: Sequence[int],
        memory_slots: SlotsOf | None,
    ) -> None:
        """Find the generated tokens of a row in the pass, and those that precede each of them."""
        counts = np.asarray(num_tokens, np.int64)
        place = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(place)) - (counts.cumsum() - counts)[place]
        position, prompt = np.asarray(first_position)[place] + within, np.asarray(prompt_length)[place]
        index = np.flatnonzero((np.asarray(rows)[place] == row) & (position >= prompt))
        if not len(index):
            return
        if memory_slots is None:
            raise RuntimeError("a gate reads answers, but nobody says where they are kept")
        back = np.arange(self._answer_window[row] - 1, -1, -1)
        window = position[index, None] - back
        present = window >= prompt[index, None]
        slots = memory_slots(place[index, None], np.maximum(window, prompt[index, None]))
        self.step.answers[row] = AnswerTokens(
            row,
            torch.from_numpy(index).to(self.device),
            slots.to(self.device),
            torch.from_numpy(present).to(self.device),
        )

    def compile_kernels(self, points: Iterable[Point], dtype: torch.dtype, *, pair: bool) -> None:
        """Compile the GPU kernels for tables at these points, so that no request waits for it.

        ``pair``: whether the stream after a layer is a sum, as in `SiteHooks`.
        """
        for point in points:
            site = Site(0, point)
            table = self.tables.get(site) or self._new_table(site)
            hidden = torch.zeros(16, table.width, dtype=dtype, device=self.device)
            residual = hidden.clone() if pair and point == "resid_post" else None
            source = None if point != "attn_proj" else hidden.new_zeros(16, table.read_width)
            step = StepMap(requests=1, gates=MAX_GATES, device=self.device)
            step.begin(rows=[1], slots=[0], num_tokens=[16], first_position=[0], prompt_length=[16])
            for backend in ("triton-token", "triton-tile"):
                apply_edits(hidden, table, step, residual, source, backend=backend)

    def keep_memory(self, slots: int) -> None:
        """Reserve memory for gates over this many prompt tokens; existing contents are kept."""
        if self.step.memory is None or len(self.step.memory) < slots:
            larger = new_memory(slots, self.device)
            if self.step.memory is not None:
                larger[: len(self.step.memory)] = self.step.memory
            self.step.memory = larger

    def _replays(self, row: int) -> bool | None:
        """An entry of `_replayable`; None if the row needs every pass to run outside graphs."""
        whole = [row in table.topk_rows or table.sum_ranks is not None for table in self._tables_of(row)]
        gates = [view for site, view in self._gates_of[row] if site is not None]
        if any(whole) or any(not view.prompt_end for view in gates):
            return None
        return bool(gates)

    def _tables_of(self, row: int) -> list[SiteTable]:
        return [table for table in self.tables.values() if row in table.views]

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
            self.tables[site] = self._new_table(site)
        return self.tables[site]

    def _new_table(self, site: Site) -> SiteTable:
        return SiteTable(
            self.spec.width(site.point),
            read_width=self.spec.read_width(site.point),
            rows=self.rows,
            units=self._units_per_site,
            scales=self.rows if site.point == "attn_z" else 0,
            device=self.device,
            sum_ranks=self._sum_at(site),
        )

    def _sum_at(self, site: Site | None) -> SumRanks | None:
        """At the heads' points, readings are split over ranks; elsewhere each rank has all of them."""
        return self._sum_ranks if site is not None and site.point in HEAD_POINTS else None

    def _index_gates(self) -> None:
        self.gates_at = {}
        self._siteless = []
        self._reads_prompts = frozenset(
            row
            for row, gates in self._gates_of.items()
            if any(view.probe and not view.answer for _, view in gates)
        )
        self._answer_window = {
            row: max(windows)
            for row, gates in self._gates_of.items()
            if (windows := [view.probe.window or 0 for _, view in gates if view.probe and view.answer])
        }
        found = {row: self._replays(row) for row in self._gates_of}
        self._replayable = {row: past_prompt for row, past_prompt in found.items() if past_prompt is not None}
        for gates in self._gates_of.values():
            for site, view in gates:
                if site is None:
                    self._siteless.append(view)
                else:
                    self.gates_at.setdefault(site, []).append(view)
