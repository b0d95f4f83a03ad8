"""Proposes a direction or features behind a gate, so that target prompts are answered as wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.frozen_model import open_frozen_model
from discovery.gates.contrast import PARTS, SIDES, Contrast, subset
from discovery.jobs.checksummed_file import digest
from discovery.jobs.progress import meter
from discovery.jobs.run_folder import claim_folder
from discovery.jobs.run_record import run_record
from discovery.jobs.step_cache import StepCache
from discovery.proposals.answer.edits import (
    Action,
    direction_actions,
    feature_actions,
)
from discovery.proposals.answer.evidence import Evidence
from discovery.proposals.answer.gates import GateChoice, feature_gates, probe_gates
from discovery.proposals.answer.grid import Grid, Point, best
from discovery.proposals.artifact import (
    ProposalPaths,
    no_point,
    policy_yaml,
    vector_file,
    write_policy,
    write_record,
    write_vectors,
)
from discovery.proposals.dictionaries import chosen_dictionary
from discovery.proposals.origin import Origin, from_circuit, from_features
from discovery.proposals.settings import ANEW, ProposeSettings
from interpretops.artifacts.dictionary import Dictionary
from interpretops.settings import Settings
from interpretops.steering.hooked_model import HookedModel

DIRECTION_STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
FEATURE_STRENGTHS = (1.0, 2.0, 3.0, 5.0)
BARS = ("defense_efficacy_min", "collateral_damage_max")
LAYER_SHARES = (0.4, 0.5, 0.6)
"""Depths, as shares of the model's layers, at which a direction is tried when no layers are named."""


@dataclass(frozen=True)
class Draft:
    """Everything that the grid combines."""

    gates: list[GateChoice]
    actions: list[Action]
    vectors: dict[str, Tensor]
    found: dict[str, Any]
    """For the run record: the probe's AUROC, and features with the reasons for choosing them."""


class AnswerProposal:
    """One run of `propose` for a contrast whose aim is ``answer``."""

    def __init__(
        self,
        settings: Settings,
        chosen: ProposeSettings,
        contrast: Contrast,
        paths: ProposalPaths,
        work: Path,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.chosen, self.contrast, self.paths, self.say = (
            settings, chosen, contrast, paths, say,
        )  # fmt: skip
        self.model = open_frozen_model(settings, say)
        self.origin = self._origin()
        self.dictionary = self._dictionary()
        self.prompts = {
            "discovery": {
                s: subset(contrast["discovery", s], chosen.most_discovery, chosen.seed) for s in SIDES
            },
            "selection": {
                s: subset(contrast["selection", s], chosen.most_selection, chosen.seed) for s in SIDES
            },
        }
        identity = {
            "job": "propose",
            "model": self.model.spec.fingerprint,
            "prompts": digest(self.prompts),
            "settings": _that_decide(chosen),
            "origin": list(self.origin.record),
            "dictionary": self.dictionary.manifest.weights.sha256 if self.dictionary else None,
        }
        claim_folder(work, identity, ANEW)
        self.cache = StepCache(work, identity)
        self.evidence = Evidence(self.model, self.prompts, contrast.wanted, chosen, self.cache)

    def run(self) -> None:
        """Fit, search, choose, write."""
        draft = self._draft()
        file = vector_file(self.paths.policy_id)
        drafts = self.cache.folder / "draft"
        spec = self.model.spec
        write_vectors(drafts / "open.safetensors", {"open": torch.ones(spec.hidden_size)}, spec)
        if draft.vectors:
            write_vectors(drafts / file, draft.vectors, spec)
        points = self._points(draft, drafts)
        record = self._record(draft, points)
        choice = best([point for point, _, _ in points])
        if choice is None:
            write_record(self.paths.record, record | {"chosen": None})
            nearest = max((p for p, _, _ in points), key=lambda p: p.efficacy - p.damage - p.over_reach)
            raise no_point(self.paths.policy_id, self.paths.record, f"the nearest: {_words(nearest)}")
        _, action, gate = next(entry for entry in points if entry[0] == choice)
        if draft.vectors:
            used = {key: value for key, value in draft.vectors.items() if key in str([action, gate])}
            write_vectors(self.paths.artifacts / spec.name / file, used, spec)
        text = self._policy(action, gate, choice)
        revision = write_policy(text, record | {"chosen": choice.record()}, self.paths, spec)
        self.say(f"chosen: {_words(choice)}")
        self.say(f"{self.paths.policy}: policy, revision {revision[:12]}; {self.paths.record}: record")

    def _origin(self) -> Origin:
        if self.chosen.features is not None:
            return from_features(self.chosen.features)
        if self.chosen.circuit is not None:
            return from_circuit(self.chosen.circuit, self.model.spec)
        return Origin()

    def _dictionary(self) -> Dictionary | None:
        if self.chosen.method != "sae-feature" and self.chosen.gate != "features":
            return None
        named = self.origin.features or {}
        layers = named.keys() if named and -1 not in named else None
        name = self.chosen.dictionary or self.origin.dictionary
        found = chosen_dictionary(self.settings, name, self.model.spec, layers)
        layer = found.manifest.layer
        if self.chosen.method == "sae-feature" and self.chosen.layers not in (None, (layer,)):
            raise DiscoveryError(
                f"--layers = {self.chosen.layers}, but {found.manifest.id} reads at layer {layer}; "
                "leave --layers out, or name another --dictionary"
            )
        return found

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers of the edit."""
        if self.chosen.method == "sae-feature":
            assert self.dictionary is not None
            return (self.dictionary.manifest.layer,)
        shares = sorted({round(share * self.model.spec.num_layers) for share in LAYER_SHARES})
        layers = self.chosen.layers or self.origin.layers or tuple(shares)
        self.model.check_layers(layers)
        return tuple(layers)

    @cached_property
    def gate_layer(self) -> int:
        """Layer at which the gate reads: the named one, or the first of the edit."""
        if self.chosen.gate_layer is None:
            return min(self.layers)
        self.model.check_layers([self.chosen.gate_layer])
        if self.chosen.gate_layer > min(self.layers):
            raise DiscoveryError(
                f"--gate-layer = {self.chosen.gate_layer}, but the edit acts at {min(self.layers)} before it"
            )
        return self.chosen.gate_layer

    def _draft(self) -> Draft:
        gate_kind = self.chosen.gate or ("features" if self.chosen.method == "sae-feature" else "probe")
        vectors: dict[str, Tensor] = {}
        found: dict[str, Any] = {"gate": gate_kind, "gate_layer": self.gate_layer}
        file = vector_file(self.paths.policy_id)
        if gate_kind == "probe":
            ends = [self.evidence.ends(part, self.gate_layer) for part in PARTS]
            gates, probe, area = probe_gates(self.gate_layer, ends[0], ends[1], file, "probe")
            vectors["probe"] = probe.direction
            found["probe_auroc_selection"] = round(area, 4)
        else:
            assert self.dictionary is not None
            layer = self.dictionary.manifest.layer
            if layer > min(self.layers):
                raise DiscoveryError(f"--gate features reads at layer {layer}, but the edit acts before it")
            ends = [self.evidence.ends(part, layer) for part in PARTS]
            gates = feature_gates(self.dictionary, ends[0], ends[1])
            found["gate_layer"] = layer
        if self.chosen.method == "direction":
            directions = self.evidence.directions(self.layers)
            vectors |= {f"direction.{layer}": vector for layer, vector in directions.items()}
            actions = direction_actions(directions, self.chosen.strengths or DIRECTION_STRENGTHS, file)
        else:
            assert self.dictionary is not None
            given = self.origin.features_at(self.dictionary.manifest.layer)
            ranked = self.evidence.features(self.dictionary, given)
            found["features"] = [feature.record() for feature in ranked[: max(self.chosen.counts)]]
            actions = feature_actions(
                self.dictionary, ranked, self.chosen.counts, self.chosen.strengths or FEATURE_STRENGTHS
            )
        return Draft(gates, actions, vectors, found)

    def _points(self, draft: Draft, drafts: Path) -> list[tuple[Point, Action, GateChoice]]:
        steered = HookedModel(self.model.folder, dtype=self.model.network.dtype, device=self.model.device)
        grid = Grid(
            steered,
            self.settings.paths.artifacts,
            drafts,
            self.prompts["selection"],
            self.contrast.judge,
            self.chosen.answer_tokens,
            self.cache,
        )
        opened = {
            side: [any(gate.opens[side][place] for gate in draft.gates) for place in range(len(prompts))]
            for side, prompts in self.prompts["selection"].items()
        }
        points = []
        total = len(draft.actions) * sum(map(sum, opened.values()))
        with meter("propose: grid", total, "answers") as progress:
            for action in draft.actions:
                answers = grid.answers(action, opened, progress)
                found = [grid.point(action, gate, answers, self.chosen.budgets) for gate in draft.gates]
                points += [(point, action, gate) for point, gate in zip(found, draft.gates, strict=True)]
                if (top := best(found)) is not None:
                    self.say(_words(top))
        return points

    def _policy(self, action: Action, gate: GateChoice, point: Point) -> str:
        name = f"{self.contrast.name}-request"
        sizes = {side: len(prompts) for side, prompts in self.prompts["selection"].items()}
        header = [
            f"Made by `mechctl propose --from {self.chosen.start} --method {self.chosen.method}` from "
            f"{self.chosen.contrast.name}, seed {self.chosen.seed}.",
            f"On the prompts it was selected on ({sizes['target']} target, {sizes['benign']} benign, "
            f"{sizes['borderline']} borderline):",
            f"{_words(point)}.",
            f"Data, versions and all rejected points: records/{self.paths.record.name}.",
        ]
        document = {
            "meta": {
                "id": self.paths.policy_id,
                "description": f"Answers {self.contrast.name} requests as wanted, when its gate reads one",
                "target_class": self.contrast.name,
                **self.origin.of_policy,
            },
            "gates": {name: gate.document},
            "interventions": [entry | {"gate": name} for entry in action.interventions],
        }
        return policy_yaml(document, header, self.chosen)

    def _record(self, draft: Draft, points: Sequence[tuple[Point, Action, GateChoice]]) -> dict[str, Any]:
        sizes = {
            part: {side: len(prompts) for side, prompts in group.items()}
            for part, group in self.prompts.items()
        }
        record = run_record(
            "propose", self.chosen.seed, self.chosen.record(), [*self.contrast.record, *self.origin.record]
        )
        return record | {
            "model": {"name": self.model.spec.name, "fingerprint": self.model.spec.fingerprint},
            "class": self.contrast.name,
            "prompts": sizes,
            "found": draft.found,
            "curve": [point.record() for point, _, _ in points],
        }


def _that_decide(chosen: ProposeSettings) -> dict[str, Any]:
    """The settings that determine cached steps; names, budgets and grids may change between runs."""
    free = ("policy_id", "suites", *BARS, "budgets", "strengths", "counts", "gate", "gate_layer", "layers")
    return {key: value for key, value in chosen.record().items() if key not in free}


def _words(point: Point) -> str:
    setting = ", ".join(f"{key} {value}" for key, value in point.action.items())
    return (
        f"{setting}, gate rate {point.gate_rate}: {point.efficacy:.0%} of target prompts answered as wanted, "
        f"benign harmed {point.damage:.1%}, borderline {point.over_reach:.1%}"
    )
