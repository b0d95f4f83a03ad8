"""The job `fit-gate`: from harmful and benign prompts to a probe gate and a learned edit behind it.

A linear probe at the last prompt token opens a gate for the rest of the request. Behind it, ReLU rows at a
few layers decide once more and write the refusal. The gate's threshold is chosen on the selection prompts.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel, norm_bound
from discovery.gate_data import GateData, format_groups, is_harmful
from discovery.gate_probe import Probe, auroc, fit_probe, prompt_end_features, threshold_at
from discovery.gated_answers import edited_answers
from discovery.gated_edit import (
    ANSWER_TOKENS,
    EditSettings,
    Example,
    GatedEdit,
    Pick,
    settings_record,
    train_edit,
)
from discovery.progress import meter
from discovery.refusal import is_coherent, is_refusal, targets
from interpretops.atomic_file import write_atomically

LONGEST_TRAINED = 320
HARD_BENIGN = 600
"""How many benign training prompts, the ones nearest to opening the gate, the edit is trained on."""
JUDGED_TOKENS = 44


@dataclass(frozen=True)
class GateSettings:
    """What decides the gate."""

    layer: int
    loose_rate: float = 0.06
    """Share of benign selection prompts that may open the gate while the edit is trained."""
    benign_budget: float = 0.02
    """Share of benign selection prompts that may newly be refused."""
    borderline_budget: float = 0.12
    """The same for benign prompts that sound harmful."""


Features = dict[str, dict[int, Tensor]]


class GateFit:
    """The state of one run: model, data, features, probe, edit. Every slow step is kept in ``work``."""

    def __init__(
        self, model: FrozenModel, data: GateData, gate: GateSettings, edit: EditSettings, work: Path
    ) -> None:
        edit.check()
        model.check_layers([gate.layer, *edit.layers])
        if min(edit.layers) < gate.layer:
            raise DiscoveryError(
                f"layers = {edit.layers}, but the gate reads at layer {gate.layer}, after that"
            )
        self.model, self.data, self.gate, self.edit_settings, self.work = model, data, gate, edit, work
        self.layers = sorted({gate.layer, *edit.layers})
        self.prompts = format_groups(model, data.train | data.select | data.test)
        self.features = self._features()
        self.norms = {
            layer: float(torch.cat([self.features[name][layer] for name in data.train]).norm(dim=-1).median())
            for layer in self.layers
        }
        self.max_norm = {
            layer: norm_bound(torch.cat([self.features[n][layer] for n in data.train]).norm(dim=-1), 8.0)
            for layer in self.layers
        }
        self.probe = self._fit(gate.layer)
        self.readings = {name: self.probe.read(f[gate.layer]) for name, f in self.features.items()}
        plain = [n for n in data.select if not is_harmful(n) and "borderline" not in n]
        self.loose = threshold_at(torch.cat([self.readings[name] for name in plain]), gate.loose_rate)

    def _features(self) -> Features:
        ids = hashlib.sha256(
            repr((self.prompts, self.layers, self.model.spec.fingerprint)).encode()
        ).hexdigest()
        path = self.work / "features.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                same = file.metadata().get("prompts") == ids
            if same:
                return _unflatten(load_file(path))
        total = sum(len(i) for group in self.prompts.values() for i in group)
        with meter("fit-gate: activations", total, "tokens") as progress:
            found = {
                name: prompt_end_features(self.model, group, self.layers, progress)
                for name, group in self.prompts.items()
            }
        tensors = {f"{name}/{layer}": x for name, group in found.items() for layer, x in group.items()}
        write_atomically(path, save_safetensors(tensors, {"prompts": ids}))
        return found

    def _fit(self, layer: int, seed: int | None = None) -> Probe:
        """A probe on the training groups; with a seed on a random four fifths of them."""
        sides: dict[bool, list[Tensor]] = {True: [], False: []}
        weights: dict[bool, list[Tensor]] = {True: [], False: []}
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        for name in self.data.train:
            x = self.features[name][layer]
            if seed is not None:
                x = x[torch.rand(len(x), generator=generator) < 0.8]
            sides[is_harmful(name)].append(x)
            weights[is_harmful(name)].append(torch.full((len(x),), 2.0 if "borderline" in name else 1.0))
        weight = torch.cat(weights[True] + weights[False])
        return fit_probe(torch.cat(sides[True]), torch.cat(sides[False]), weight)

    def train(self) -> GatedEdit:
        """Train the edit behind the loosely opened gate."""
        settings = self.edit_settings
        edit = GatedEdit(
            self.model.spec.hidden_size,
            settings.rank,
            {n: self.norms[n] for n in settings.layers},
            settings.seed,
        )
        for layer in settings.layers:
            for row in range(settings.rank // 2):
                probe = self._fit(layer, seed=100 * layer + row)
                benign = torch.cat(
                    [probe.read(self.features[n][layer]) for n in self.data.train if not is_harmful(n)]
                )
                edit.start_from(layer, row, probe, threshold_at(benign, 0.02 + 0.02 * row))
        identity = {
            "settings": settings_record(settings),
            "gate": asdict(self.gate),
            "prompts": hashlib.sha256(repr(self.data.train).encode()).hexdigest(),
            "model": self.model.spec.fingerprint,
        }
        return train_edit(
            self.model, edit, self._picker(), settings, self.work / "edit.safetensors", identity
        )

    def _picker(self) -> Pick:
        stop = self.model.tokenizer.decode(self.model.stop_ids[:1]) if self.model.stop_ids else ""
        refusals = [tuple(self.model.text_ids(text)) for text in targets(stop)]
        harmful: list[list[Example]] = []
        for name in self.data.train:
            if is_harmful(name):
                open_ = (self.readings[name] > self.loose).tolist()
                chosen = [p for p, is_open in zip(self.prompts[name], open_, strict=True) if is_open]
                harmful.append(
                    [
                        Example(p, refusals[sum(p) % len(refusals)])
                        for p in chosen
                        if len(p) <= LONGEST_TRAINED
                    ]
                )
        harmful = [group for group in harmful if group]
        benign = self._hard_benign()
        if not harmful or not benign:
            raise DiscoveryError(
                "no training prompt opens the gate; give more prompts or a larger loose rate"
            )
        sizes = [len(group) ** 0.7 for group in harmful]

        def pick(step: int) -> tuple[Sequence[Example], Sequence[Example]]:
            chance = random.Random(self.edit_settings.seed * 1_000_003 + step)  # noqa: S311 (sampling)
            groups = chance.choices(harmful, sizes, k=self.edit_settings.batch)
            return [chance.choice(group) for group in groups], chance.sample(
                benign, min(self.edit_settings.batch, len(benign))
            )

        return pick

    def _hard_benign(self) -> list[Example]:
        near = sorted(
            (
                (float(reading), ids)
                for name in self.data.train
                if not is_harmful(name)
                for reading, ids in zip(self.readings[name], self.prompts[name], strict=True)
                if len(ids) <= LONGEST_TRAINED
            ),
            reverse=True,
        )
        prompts = [ids for _, ids in near[:HARD_BENIGN]]
        path = self.work / "benign_answers.json"
        key = hashlib.sha256(repr(prompts).encode()).hexdigest()
        kept = json.loads(path.read_bytes()) if path.exists() else {}
        if kept.get("prompts") != key:
            with meter("fit-gate: benign answers", len(prompts), "prompts") as progress:
                kept = {
                    "prompts": key,
                    "answers": edited_answers(self.model, None, prompts, ANSWER_TOKENS, progress),
                }
            write_atomically(path, json.dumps(kept).encode())
        pairs = zip(prompts, kept["answers"], strict=True)
        return [Example(p, tuple(answer)) for p, answer in pairs if len(answer) >= 4]

    def outcomes(self, edit: GatedEdit, groups: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """For each prompt of the groups: its reading, and the answer it gets while the gate is loose."""
        results: dict[str, list[dict[str, Any]]] = {}
        total = sum(int((self.readings[name] > self.loose).sum()) for name in groups)
        with meter("fit-gate: answers", total, "prompts") as progress:
            for name in groups:
                readings = self.readings[name].tolist()
                opened = [i for i, reading in enumerate(readings) if reading > self.loose]
                answers = edited_answers(
                    self.model, edit, [self.prompts[name][i] for i in opened], JUDGED_TOKENS, progress
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

    def choose_threshold(self, outcomes: dict[str, list[dict[str, Any]]]) -> float:
        """The lowest threshold, not below the loose one, that keeps both budgets on the selection prompts."""
        budgets = {
            name: self.gate.borderline_budget if "borderline" in name else self.gate.benign_budget
            for name in self.data.select
            if not is_harmful(name)
        }
        least = self.loose
        for name, budget in budgets.items():
            refused = sorted((o["reading"] for o in outcomes[name] if o["refused"]), reverse=True)
            allowed = int(budget * len(outcomes[name]))
            if len(refused) > allowed:
                least = max(least, refused[allowed])
        return round(least + 5e-4, 3)

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

    def probe_auroc(self, groups: dict[str, list[str]]) -> float:
        """AUROC of the probe over the harmful and the benign prompts of some groups."""
        sides: dict[bool, list[Tensor]] = {True: [], False: []}
        for name in groups:
            sides[is_harmful(name)].append(self.readings[name])
        return auroc(torch.cat(sides[True]), torch.cat(sides[False])) if all(sides.values()) else float("nan")


def _unflatten(tensors: dict[str, Tensor]) -> Features:
    found: Features = {}
    for key, value in tensors.items():
        name, _, layer = key.rpartition("/")
        found.setdefault(name, {})[int(layer)] = value
    return found
