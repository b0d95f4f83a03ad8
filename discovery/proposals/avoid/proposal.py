"""Proposes edits for classes to avoid: answers should show a trait less.

No gate at the prompt's end is needed: a token gate, a feature's own activation or a ReLU row acts on the
token that it reads. So there is no state, and prefix caches cannot change the effect.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.frozen_model import open_frozen_model
from discovery.gates.contrast import PARTS, SIDES, Contrast, subset
from discovery.jobs.checksummed_file import digest
from discovery.jobs.progress import Meter, meter
from discovery.jobs.run_folder import claim_folder
from discovery.jobs.run_record import run_record
from discovery.jobs.step_cache import StepCache
from discovery.proposals.artifact import (
    ProposalPaths,
    no_point,
    policy_yaml,
    vector_file,
    write_policy,
    write_record,
    write_vectors,
)
from discovery.proposals.avoid.answer_trait import Sampled, locate, sampled_answers
from discovery.proposals.avoid.candidates import AvoidCandidates, Candidate
from discovery.proposals.greedy_answers import greedy_answers
from discovery.proposals.judging import fails, shows
from discovery.proposals.settings import ANEW, ProposeSettings
from interpretops.files.strict_yaml import Document
from interpretops.policy import policy_from_document
from interpretops.settings import Settings
from interpretops.steering.causal_model import CausalModel
from interpretops.steering.hooked_model import HookedModel
from interpretops.steering.session import SteeringSession

CONTINUATION = 28
"""Tokens of a sampled continuation."""
AT_ONCE = 96
"""Continuations that are sampled and written together."""
LONGEST_TEXT = 56
"""Most tokens of a piece of text for training."""
BENIGN_SAMPLES = 64
"""Benign discovery prompts whose sampled answers an edit must not change."""
BENIGN = 40
"""Benign selection prompts that every point of the grid answers."""
TEXTS = {"discovery": 400, "selection": 40}


@dataclass(frozen=True)
class AvoidPoint:
    """One policy, measured on the selection prompts."""

    action: dict[str, Any]
    efficacy: float
    """Relative fall in the share of sampled continuations with the trait, against the model's own."""
    trait_rate: float
    own_rate: float
    damage: float
    """Share of benign prompts that newly fail."""
    text_cost: float
    """Rise of the cross-entropy of benign text, in nats per token."""
    keeps_budgets: bool


class AvoidProposal:
    """One run of `propose` for a contrast whose aim is ``avoid``."""

    def __init__(
        self,
        settings: Settings,
        chosen: ProposeSettings,
        contrast: Contrast,
        paths: ProposalPaths,
        work: Path,
        say: Callable[[str], None],
    ) -> None:
        if contrast.judge.kind == "refusal":
            raise DiscoveryError(
                f"{chosen.contrast}: judge.kind = 'refusal', but aim 'avoid' is against a trait; "
                "use words or toxicity"
            )
        if chosen.start == "circuit":
            raise DiscoveryError("--from circuit is for classes with aim 'answer'; use contrast or features")
        self.settings, self.chosen, self.contrast, self.paths, self.say = (
            settings, chosen, contrast, paths, say,
        )  # fmt: skip
        self.model = open_frozen_model(settings, say)
        most = {"discovery": chosen.most_discovery, "selection": chosen.most_selection}
        self.prompts = {
            part: {side: subset(contrast[part, side], most[part], chosen.seed) for side in SIDES}
            for part in PARTS
        }
        self.texts = {part: subset(contrast.text.get(part, ()), TEXTS[part], chosen.seed) for part in PARTS}
        identity = {
            "job": "propose",
            "model": self.model.spec.fingerprint,
            "prompts": digest([self.prompts, self.texts]),
            "class": digest([contrast.judge.model_dump(), contrast.formats]),
            "seed": chosen.seed,
        }
        claim_folder(work, identity, ANEW)
        self.cache = StepCache(work, identity)
        self.steered = HookedModel(
            self.model.folder, dtype=self.model.network.dtype, device=self.model.device
        )

    def run(self) -> None:
        """Sample answers, find the trait in them, make edits, measure each, and write the best."""
        samples = self._samples("discovery")
        shown = [s for s in samples if s.begins is not None]
        self.say(f"{len(shown)} of {len(samples)} sampled continuations of discovery prompts show the trait")
        contrasted = self.chosen.method != "word-rows"
        if contrasted and (len(shown) < 4 or len(shown) > len(samples) - 4):
            raise DiscoveryError(
                f"{self.chosen.contrast}: {len(shown)} of {len(samples)} continuations show the trait, but "
                "both kinds are needed, at least 4 of each; give other target prompts"
            )
        own = self._samples("selection")
        edits = AvoidCandidates(self.settings, self.chosen, self.contrast, self.model, self.cache, self.paths)
        candidates = edits.candidates(samples, self._benign_samples(), self._text_samples("discovery"))
        points = []
        with meter("propose: grid", len(candidates), "points") as progress:
            for candidate in candidates:
                point = self._point(candidate, edits.folder, own)
                points.append((point, candidate))
                self.say(_words(point))
                progress.advance(1)
        record = self._record(points, edits.found, len(shown), len(samples))
        within = [entry for entry in points if entry[0].keeps_budgets and entry[0].efficacy > 0]
        if not within:
            write_record(self.paths.record, record | {"chosen": None})
            nearest = max((point for point, _ in points), key=lambda p: p.efficacy - 5 * p.damage)
            raise no_point(self.paths.policy_id, self.paths.record, f"the nearest: {_words(nearest)}")
        point, candidate = max(within, key=lambda entry: (entry[0].efficacy, -entry[0].text_cost))
        if candidate.vectors:
            file = self.paths.artifacts / self.model.spec.name / vector_file(self.paths.policy_id)
            write_vectors(file, candidate.vectors, self.model.spec)
        header = [
            f"Made by `mechctl propose --from {self.chosen.start} --method {self.chosen.method}` from "
            f"{self.chosen.contrast.name}, seed {self.chosen.seed}.",
            f"On the prompts it was selected on ({len(own)} sampled continuations, "
            f"{len(self._benign('selection'))} benign prompts):",
            f"{_words(point)}.",
            f"Data, versions and all rejected points: records/{self.paths.record.name}.",
        ]
        text = policy_yaml(candidate.document, header, self.chosen)
        revision = write_policy(text, record | {"chosen": asdict(point)}, self.paths, self.model.spec)
        self.say(f"chosen: {_words(point)}")
        self.say(f"{self.paths.policy}: policy, revision {revision[:12]}; {self.paths.record}: record")

    def _formatted(self, part: str) -> list[list[int]]:
        found = []
        for form in self.contrast.formats:
            make = self.model.chat_ids if form == "chat" else self.model.text_ids
            found += [make(prompt) for prompt in self.prompts[part]["target"]]
        return found

    def _samples(self, part: str) -> list[Sampled]:
        prompts = self._formatted(part)
        answers = self._sampled(f"samples_{part}", prompts)
        return [
            locate(self.model, self.contrast.judge, prompt, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _sampled(self, name: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        answers: list[list[int]] = []
        with meter(f"propose: {name}", len(prompts), "continuations") as progress:
            for start in range(0, len(prompts), AT_ONCE):
                chunk, seed = prompts[start : start + AT_ONCE], self.chosen.seed + start
                key = f"samples/{name}_{start}"
                if self.cache.has(key):
                    progress.advance(len(chunk))
                answers += self.cache.json(key, partial(self._draw, self.model, chunk, progress, seed))
        return answers

    def _draw(
        self, model: CausalModel, prompts: Sequence[Sequence[int]], progress: Meter, seed: int
    ) -> list[list[int]]:
        return sampled_answers(model, prompts, CONTINUATION, seed, progress)

    def _benign_samples(self) -> list[Sampled]:
        prompts = [
            self.model.chat_ids(prompt) for prompt in self.prompts["discovery"]["benign"][:BENIGN_SAMPLES]
        ]
        answers = self._sampled("samples_benign", prompts)
        return [Sampled(tuple(p), tuple(a), None) for p, a in zip(prompts, answers, strict=True) if a]

    def _text_samples(self, part: str) -> list[Sampled]:
        ids = [self.model.text_ids(text)[:LONGEST_TEXT] for text in self.texts[part]]
        return [Sampled(tuple(i[:1]), tuple(i[1:]), None) for i in ids if len(i) > 8]

    def _benign(self, part: str) -> list[list[int]]:
        sides = [*self.prompts[part]["benign"][:BENIGN], *self.prompts[part]["borderline"][:BENIGN]]
        return [self.model.chat_ids(prompt) for prompt in sides]

    def _point(self, candidate: Candidate, folder: Path, own: Sequence[Sampled]) -> AvoidPoint:
        benign = self._benign("selection")

        def measure() -> dict[str, Any]:
            """Answers and text loss of the model, steered if a session is open."""
            with meter("propose: answers", len(benign) + len(own), "answers") as progress:
                drawn = self._draw(self.steered, [s.prompt for s in own], progress, self.chosen.seed)
                greedy = greedy_answers(self.steered, benign, self.chosen.answer_tokens, progress)
            return {"drawn": drawn, "benign": greedy, "text": self._text_loss()}

        def steered() -> dict[str, Any]:
            policy = policy_from_document(Document("<grid point>", candidate.document), folder)
            with SteeringSession(self.steered, policy, artifacts=self.paths.artifacts):
                return measure()

        before = self.cache.json("own_measure", measure)
        after = self.cache.json(f"points/{digest([candidate.document, candidate.mark])[:16]}", steered)
        judge = self.contrast.judge
        rates = [
            sum(shows(judge, self.model.decode(answer)) for answer in side["drawn"]) / len(own)
            for side in (before, after)
        ]
        damage = sum(
            fails(answer, mine, judge) for answer, mine in zip(after["benign"], before["benign"], strict=True)
        ) / max(len(benign), 1)
        cost = after["text"] - before["text"]
        budgets = self.chosen.budgets
        return AvoidPoint(
            candidate.settings,
            round(1 - rates[1] / rates[0], 4) if rates[0] else 0.0,
            round(rates[1], 4),
            round(rates[0], 4),
            round(damage, 4),
            round(cost, 5),
            damage <= budgets.benign and cost <= budgets.text,
        )

    @torch.no_grad()
    def _text_loss(self) -> float:
        """Cross-entropy per token of the benign text, in nats."""
        total, count = 0.0, 0
        for start in range(0, len(self.texts["selection"]), 8):
            ids = [self.model.text_ids(text) for text in self.texts["selection"][start : start + 8]]
            tokens, mask = self.model.pad(ids)
            logits: Tensor = self.steered.network(
                input_ids=tokens, attention_mask=mask, use_cache=False
            ).logits
            logprobs = logits[:, :-1].float().log_softmax(-1)
            picked = logprobs.gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
            total, count = total - float(picked.sum()), count + int(mask[:, 1:].sum())
        return total / max(count, 1)

    def _record(
        self, points: Sequence[tuple[AvoidPoint, Any]], found: dict[str, Any], shown: int, sampled: int
    ) -> dict[str, Any]:
        return run_record("propose", self.chosen.seed, self.chosen.record(), self.contrast.record) | {
            "model": {"name": self.model.spec.name, "fingerprint": self.model.spec.fingerprint},
            "class": self.contrast.name,
            "prompts": {part: {s: len(p) for s, p in group.items()} for part, group in self.prompts.items()},
            "discovery_samples": {"n": sampled, "with_trait": shown},
            "found": found,
            "curve": [asdict(point) for point, _ in points],
        }


def propose_avoid(
    settings: Settings,
    chosen: ProposeSettings,
    contrast: Contrast,
    paths: ProposalPaths,
    work: Path,
    say: Callable[[str], None],
) -> None:
    """Run `AvoidProposal`."""
    AvoidProposal(settings, chosen, contrast, paths, work, say).run()


def _words(point: AvoidPoint) -> str:
    setting = ", ".join(f"{key} {value}" for key, value in point.action.items())
    return (
        f"{setting}: {point.own_rate:.1%} -> {point.trait_rate:.1%} of continuations with the trait "
        f"({point.efficacy:.0%} fewer), benign harmed {point.damage:.1%}, text {point.text_cost:+.4f} nats"
    )
