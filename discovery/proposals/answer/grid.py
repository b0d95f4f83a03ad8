"""Chooses gate and strength on selection prompts.

Behind a gate that latches at the prompt's end, an edit has the same effect whichever gate opened. So answers
are generated once per edit, only for prompts that open the loosest gate, and each gate selects among them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from discovery.gates.contrast import SIDES, Judged
from discovery.jobs.checksummed_file import digest
from discovery.jobs.progress import Meter, meter
from discovery.jobs.step_cache import StepCache
from discovery.proposals.answer.edits import Action
from discovery.proposals.answer.gates import GateChoice
from discovery.proposals.greedy_answers import greedy_answers
from discovery.proposals.judging import fails, shows
from discovery.proposals.settings import Budgets
from interpretops.files.strict_yaml import Document
from interpretops.policy import policy_from_document
from interpretops.steering.hooked_model import HookedModel
from interpretops.steering.session import SteeringSession

OPEN_GATE = "target"


@dataclass(frozen=True)
class Point:
    """One gate with one edit, measured on the selection prompts."""

    action: dict[str, Any]
    gate_rate: float
    efficacy: float
    """Of the target prompts that the model itself does not answer as wanted, the share that now is."""
    damage: float
    """Share of benign prompts that newly fail."""
    over_reach: float
    """The same for borderline prompts."""
    gate_open: dict[str, float]
    """Share of each side's prompts that open the gate."""
    keeps_budgets: bool
    effort: float

    def record(self) -> dict[str, Any]:
        """Plain JSON, rounded."""
        return {
            key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()
        }


class Grid:
    """The selection prompts with the model's own answers, and a cache of steered answers."""

    def __init__(
        self,
        model: HookedModel,
        artifacts: Path,
        folder: Path,
        prompts: Mapping[str, Sequence[str]],
        judge: Judged,
        most: int,
        cache: StepCache,
    ) -> None:
        self.model, self.artifacts, self.folder, self.judge, self.most, self.cache = (
            model, artifacts, folder, judge, most, cache,
        )  # fmt: skip
        self.ids = {side: [model.tokens(p) for p in prompts.get(side, ())] for side in SIDES}
        total = sum(map(len, self.ids.values()))
        with meter("propose: own answers", total, "answers") as progress:
            self.own: dict[str, list[str]] = cache.json(
                "own_answers", lambda: {side: self._answers(ids, progress) for side, ids in self.ids.items()}
            )

    def answers(
        self, action: Action, opened: Mapping[str, Sequence[bool]], progress: Meter
    ) -> dict[str, Any]:
        """Steered answers to the prompts that open the loosest gate; None for the others."""
        name = f"points/{digest([action.interventions, opened])[:16]}"
        if self.cache.has(name):
            progress.advance(sum(map(sum, opened.values())))

        def compute() -> dict[str, Any]:
            session = SteeringSession(self.model, self._draft(action), artifacts=self.artifacts)
            found: dict[str, Any] = {}
            for side, mask in opened.items():
                chosen = [ids for ids, is_open in zip(self.ids[side], mask, strict=True) if is_open]
                with session:
                    steered = iter(self._answers(chosen, progress))
                found[side] = [next(steered) if is_open else None for is_open in mask]
            return found

        return self.cache.json(name, compute)

    def point(
        self, action: Action, gate: GateChoice, answers: Mapping[str, Sequence[str | None]], budgets: Budgets
    ) -> Point:
        """Measure one gate with an edit's answers."""
        gained, failed, opened = 0, {"benign": 0, "borderline": 0}, {}
        wanting = 0
        for side in SIDES:
            mask = gate.opens[side]
            opened[side] = sum(mask) / max(len(mask), 1)
            for is_open, own, steered in zip(mask, self.own[side], answers[side], strict=True):
                answer = steered if is_open and steered is not None else own
                if side == "target":
                    if not shows(self.judge, own):
                        wanting += 1
                        gained += shows(self.judge, answer)
                else:
                    failed[side] += fails(answer, own, self.judge)
        sizes = {side: len(self.own[side]) for side in SIDES}
        keeps = all(
            failed[side] <= int(share * sizes[side])
            for side, share in (("benign", budgets.benign), ("borderline", budgets.borderline))
        )
        return Point(
            action.settings,
            gate.rate,
            gained / max(wanting, 1),
            failed["benign"] / max(sizes["benign"], 1),
            failed["borderline"] / max(sizes["borderline"], 1),
            {side: round(share, 4) for side, share in opened.items()},
            keeps,
            action.effort,
        )

    def _draft(self, action: Action) -> Any:
        """The edit behind a gate that opens at the end of every prompt."""
        site = action.interventions[0]["selector"]["layer"]
        gate = {
            "layer": site,
            "conditions": [{"probe": {"file": "open.safetensors"}, "threshold": -1e6}],
            "scope": "prompt_end",
            "latched": True,
        }
        document = {
            "meta": {"id": "draft"},
            "gates": {OPEN_GATE: gate},
            "interventions": [entry | {"gate": OPEN_GATE} for entry in action.interventions],
        }
        return policy_from_document(Document("<grid point>", document), self.folder)

    def _answers(self, prompts: Sequence[Sequence[int]], progress: Meter) -> list[str]:
        return greedy_answers(self.model, prompts, self.most, progress)


def best(points: Sequence[Point]) -> Point | None:
    """The most effective point within the budgets; of equally effective ones, the least damaging."""
    within = [point for point in points if point.keeps_budgets and point.efficacy > 0]
    key = lambda p: (p.efficacy, -p.damage, -p.over_reach, -p.effort)  # noqa: E731 (one line, used once)
    return max(within, key=key, default=None)
