"""The job `fit-gate`: from harmful and benign prompts to a learned gate and a learned edit behind it.

An attention probe over the prompt opens the gate for the rest of the request, and the edit behind it writes
the refusal. The threshold is chosen on the selection prompts; the test prompts are used only for the report.
"""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discovery.data.prompt_variants import conversation, conversation_ids
from discovery.data.trace import batches
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel, norm_bound
from discovery.gates.gate_data import GateData, Groups, format_groups, formatted, is_harmful
from discovery.gates.gate_probe import auroc
from discovery.gates.gate_settings import EditSettings, GateSettings
from discovery.gates.gated_answers import edited_answers
from discovery.gates.gated_edit import ANSWER_TOKENS, Example, Pick, settings_record, train_edit
from discovery.gates.joined_probes import check_heads, mean_of, read_numbers
from discovery.gates.learned_gate import Labelled, train_probes
from discovery.gates.low_rank import LowRankRows
from discovery.gates.prompt_activations import PromptActivations
from discovery.gates.refusal_sentences import targets
from discovery.jobs.checksummed_file import load_json_if_same_run, save_json
from discovery.jobs.progress import meter
from interpretops.refusal_detector import is_coherent, is_refusal

LONGEST_TRAINED = 320
SHARE_OF_TEXT = 0.2
"""Share of benign training examples that are pieces of plain text."""
HARD_BENIGN = 600
"""Benign training prompts that constrain the edit: those nearest to opening the gate."""
LEAST_OF_SOURCE = 100
"""Prompts from which on a benign selection group must keep a budget of its own."""
JUDGED_TOKENS = 32
MEASURED = 96
"""Training prompts used to measure the norms of the residual stream."""
SINK_RATIO = 4.0
"""Tokens whose norm exceeds this many medians are attention sinks, which the gate does not read."""
WRITTEN_TOKENS = 96
"""Tokens of a text that the model writes from an opening."""


class GateFit:
    """The state of one run: model, data, gate, edit. Every slow step is saved in ``work``."""

    def __init__(
        self,
        model: FrozenModel,
        data: GateData,
        gate: GateSettings,
        edit: EditSettings,
        work: Path,
        join: Sequence[Path] = (),
        store: Path | None = None,
    ) -> None:
        """join  existing probe files, each of which adds one probe

        store  folder of activations, shared by runs; else in ``work``
        """
        store = work / "activations" if store is None else store
        model.check_layers([*gate.layers, *edit.layers])
        if min(edit.layers) < gate.layers[-1]:
            raise DiscoveryError(
                f"layers = {edit.layers}, but the gate reads at the later layer {gate.layers[-1]}"
            )
        if unknown := [name for name, _ in gate.weights if name not in data.train]:
            raise DiscoveryError(
                f"weights = {unknown[0]!r}, but the training data has no such group; name one of "
                + ", ".join(data.train)
            )
        self.model, self.data, self.gate_settings, self.edit_settings = model, data, gate, edit
        self.work, self.join = work, tuple(join)
        joined = [read_numbers(path, model.spec, gate.layers) for path in join]
        check_heads(gate.all_heads, joined)
        self.identity = {
            "train": hashlib.sha256(repr((data.train, data.plain_text, data.openings)).encode()).hexdigest(),
            "around": hashlib.sha256(repr(data.surroundings).encode()).hexdigest(),
            "model": model.spec.fingerprint,
        }
        self.plain_text = [tuple(model.text_ids(text)) for text in data.plain_text] + self._written()
        self.norms, self.max_norm = self._measure_norms(sorted({*gate.layers, *edit.layers}))
        chance = random.Random(gate.seed)  # noqa: S311 (sampling)
        examples = [self._draw(chance) for _ in range(gate.examples)]
        activations = PromptActivations(model, [ids for ids, _ in examples], gate.layers, store)
        bounds = [self.max_norm[layer] for layer in gate.layers]
        of_class = [wanted for _, wanted in examples]
        probes = train_probes(gate, activations, bounds, of_class, work, self.identity, model.device)
        self.gate = mean_of(probes, joined)
        self.prompts = format_groups(model, data.select | data.test)
        total = sum(len(ids) for group in self.prompts.values() for ids in group)
        with meter("fit-gate: readings", total, "tokens") as progress:
            self.readings = {
                name: self.gate.readings(model, group, progress) for name, group in self.prompts.items()
            }

    def _written(self) -> list[tuple[int, ...]]:
        """Texts that the model writes from the data's openings; sampled once and saved."""
        if not self.data.openings:
            return []
        path = self.work / "written.json"
        if (kept := load_json_if_same_run(path, self.identity["train"])) is not None:
            return [tuple(ids) for ids in kept]
        opened = [self.model.text_ids(text) for text in self.data.openings]
        texts: list[list[int]] = []
        with meter("fit-gate: texts of the model's own", len(opened), "texts") as progress:
            for batch in batches(opened, room=WRITTEN_TOKENS):
                prompts = [ids for _, ids in batch]
                written = self.model.answers(prompts, WRITTEN_TOKENS, sample_seed=len(texts))
                texts += [[*ids, *more] for ids, more in zip(prompts, written, strict=True)]
                progress.advance(len(prompts))
        save_json(path, self.identity["train"], texts)
        return [tuple(ids) for ids in texts]

    @torch.no_grad()
    def _measure_norms(self, layers: list[int]) -> tuple[dict[int, float], dict[int, float]]:
        """The typical norm of a prompt token at each layer, and the norm above which a token is a sink."""
        prompts = [prompt for group in self.data.train.values() for prompt in group]
        some = random.Random(0).sample(prompts, min(MEASURED, len(prompts)))  # noqa: S311 (sampling)
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for batch in batches([list(formatted(self.model, prompt, LONGEST_TRAINED)) for prompt in some]):
            tokens, mask = self.model.pad([ids for _, ids in batch])
            for layer, x in self.model.residuals(tokens, mask, layers).items():
                found[layer].append(x.float().norm(dim=-1)[mask.bool()].cpu())
        norms = {layer: torch.cat(parts) for layer, parts in found.items()}
        return (
            {layer: float(values.median()) for layer, values in norms.items()},
            {layer: norm_bound(values, SINK_RATIO) for layer, values in norms.items()},
        )

    def _draw(self, chance: random.Random) -> Labelled:
        """Draw a training example: both sides equally often, groups in proportion to size and weight."""
        of_class = chance.random() < 0.5
        while True:
            if not of_class and self.plain_text and chance.random() < SHARE_OF_TEXT:
                text = chance.choice(self.plain_text)
                ids = text[: chance.randrange(min(10, len(text)), len(text) + 10)]
            else:
                names = [name for name in self.data.train if is_harmful(name) == of_class]
                weights = dict(self.gate_settings.weights)
                sizes = [len(self.data.train[name]) ** 0.8 * weights.get(name, 1.0) for name in names]
                request = chance.choice(self.data.train[chance.choices(names, sizes)[0]])
                messages = conversation(request, self.data.surroundings, chance)
                ids = conversation_ids(self.model, messages)
            if 1 < len(ids) <= LONGEST_TRAINED:
                return ids, of_class

    def train(self) -> LowRankRows:
        """Train the edit behind the open gate."""
        settings = self.edit_settings
        edit = LowRankRows(
            self.model.spec.hidden_size,
            settings.rank,
            {n: self.norms[n] for n in settings.layers},
            settings.seed,
        ).to(self.model.device)
        identity = {"settings": settings_record(settings), **self.identity}
        if settings.benign_weight > 0:  # only then does the edit depend on the gate
            identity["gate"] = self.gate_settings.trained()
        return train_edit(
            self.model, edit, self._picker(), settings, self.work / "edit.safetensors", identity
        )

    def _picker(self) -> Pick:
        stop = self.model.tokenizer.decode(self.model.stop_ids[:1]) if self.model.stop_ids else ""
        refusals = [tuple(self.model.text_ids(text)) for text in targets(stop)]
        harmful = [prompts for name, prompts in self.data.train.items() if is_harmful(name)]
        sizes = [len(group) ** 0.7 for group in harmful]
        benign = self._hard_benign() if self.edit_settings.benign_weight > 0 else []

        def one(chance: random.Random) -> Example:
            while True:
                request = chance.choice(chance.choices(harmful, sizes)[0])
                messages = conversation(request, self.data.surroundings, chance)
                ids = conversation_ids(self.model, messages)
                if len(ids) <= LONGEST_TRAINED:
                    return Example(ids, chance.choice(refusals))

        def pick(step: int) -> tuple[Sequence[Example], Sequence[Example]]:
            chance = random.Random(self.edit_settings.seed * 1_000_003 + step)  # noqa: S311 (sampling)
            size = self.edit_settings.batch
            return [one(chance) for _ in range(size)], chance.sample(benign, min(size, len(benign)))

        return pick

    def _hard_benign(self) -> list[Example]:
        listed = [p for name, group in self.data.train.items() if not is_harmful(name) for p in group]
        all_ids = [formatted(self.model, prompt) for prompt in listed]
        ids = [prompt for prompt in all_ids if len(prompt) <= LONGEST_TRAINED]
        order = self.gate.readings(self.model, ids).argsort(descending=True)[:HARD_BENIGN].tolist()
        prompts = [ids[index] for index in order]
        path = self.work / "benign_answers.json"
        identity = [self.model.spec.fingerprint, prompts]
        kept = load_json_if_same_run(path, identity)
        if kept is None:
            with meter("fit-gate: benign answers", len(prompts), "prompts") as progress:
                kept = edited_answers(self.model, None, prompts, ANSWER_TOKENS, progress)
            save_json(path, identity, kept)
        pairs = zip(prompts, kept, strict=True)
        return [Example(p, tuple(answer)) for p, answer in pairs if len(answer) >= 4]

    def outcomes(self, edit: LowRankRows, groups: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """For each prompt of the groups: its gate reading, and its answer if the gate opens.

        The gate opens above the lowest threshold that could be chosen.
        """
        least = self._least_threshold()
        results: dict[str, list[dict[str, Any]]] = {}
        total = sum(int((self.readings[name] > least).sum()) for name in groups)
        with meter("fit-gate: answers", total, "prompts") as progress:
            for name in groups:
                readings = self.readings[name].tolist()
                opened = [i for i, reading in enumerate(readings) if reading > least]
                answers = edited_answers(
                    self.model,
                    edit,
                    [self.prompts[name][i] for i in opened],
                    JUDGED_TOKENS,
                    progress,
                )
                results[name] = [{"reading": reading, "refused": False} for reading in readings]
                for index, ids in zip(opened, answers, strict=True):
                    text = self.model.decode(ids)
                    results[name][index] |= {
                        "refused": is_refusal(text),
                        "coherent": is_coherent(text),
                        "answer": text,
                    }
        return results

    def _budgets(self) -> dict[str, float]:
        """The share of each benign selection group that may be refused."""
        return {
            name: self.gate_settings.borderline_budget
            if "borderline" in name
            else self.gate_settings.benign_budget
            for name in self.data.select
            if not is_harmful(name)
        }

    def _least_threshold(self) -> float:
        """A threshold at which twice the budget of every benign selection group opens the gate."""
        least = float("inf")
        for name, budget in self._budgets().items():
            ordered = self.readings[name].sort(descending=True).values
            least = min(least, float(ordered[min(int(2 * budget * len(ordered)) + 1, len(ordered) - 1)]))
        return least

    def choose_threshold(self, outcomes: dict[str, list[dict[str, Any]]]) -> float:
        """The lowest threshold that keeps the budgets of plain and of borderline selection prompts.

        Groups of one kind count equally, whatever their size, so a group of 60 prompts does not decide alone.
        A plain benign group of 100 or more must also keep a budget of its own: an average hides the source
        that is refused most.
        """
        least = self._least_threshold()
        settings = self.gate_settings
        for borderline in (False, True):
            names = [name for name in self._budgets() if ("borderline" in name) == borderline]
            refused = [
                (row["reading"], 1 / (len(names) * len(outcomes[name])))
                for name in names
                for row in outcomes[name]
                if row["refused"]
            ]
            share, budget = 0.0, settings.borderline_budget if borderline else settings.benign_budget
            for reading, part in sorted(refused, reverse=True):
                share += part
                if share > budget + 1e-9:
                    least = max(least, reading)
                    break
        return round(max([least, *self._worst_sources(outcomes)]) + 5e-4, 3)

    def _worst_sources(self, outcomes: dict[str, list[dict[str, Any]]]) -> list[float]:
        """Thresholds that keep each plain benign selection group of enough prompts within its own budget."""
        found = []
        for name in self._budgets():
            rows = outcomes[name]
            if "borderline" in name or len(rows) < LEAST_OF_SOURCE:
                continue
            refused = sorted((row["reading"] for row in rows if row["refused"]), reverse=True)
            allowed = int(self.gate_settings.source_budget * len(rows))
            found += refused[allowed : allowed + 1]
        return found

    def report(self, outcomes: dict[str, list[dict[str, Any]]], threshold: float) -> dict[str, Any]:
        """Per group: size, share that opens the gate, share refused, share of refusals that are coherent."""
        table = {}
        for name, rows in outcomes.items():
            refused = [o for o in rows if o["refused"] and o["reading"] > threshold]
            table[name] = {
                "n": len(rows),
                "gate_open": round(sum(o["reading"] > threshold for o in rows) / len(rows), 4),
                "refused": round(len(refused) / len(rows), 4),
                "coherent": round(sum(o["coherent"] for o in refused) / len(refused), 4) if refused else None,
            }
        return table

    def probe_auroc(self, groups: Groups) -> float:
        """AUROC of the gate over the harmful and benign prompts of these groups."""
        sides: dict[bool, list[Tensor]] = {True: [], False: []}
        for name in groups:
            sides[is_harmful(name)].append(self.readings[name])
        return auroc(torch.cat(sides[True]), torch.cat(sides[False])) if all(sides.values()) else float("nan")
