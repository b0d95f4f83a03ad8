"""Candidate policies against a trait: a direction behind a token gate, features scaled down, ReLU rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel, norm_bound
from discovery.gates.contrast import Contrast
from discovery.gates.gate_probe import Probe, auroc, fit_probe, threshold_at
from discovery.jobs.checksummed_file import digest
from discovery.jobs.progress import meter
from discovery.jobs.run_record import run_record
from discovery.jobs.step_cache import StepCache
from discovery.proposals.activation_readings import feature_auroc
from discovery.proposals.artifact import ProposalPaths, vector_file, write_rows, write_vectors
from discovery.proposals.avoid.answer_trait import Sampled, trait_tokens, trait_vocabulary
from discovery.proposals.avoid.unlikelihood_edit import UnlikelihoodSettings, initial_rows, train_edit
from discovery.proposals.avoid.unwanted_words import (
    SuppressedToken,
    Tokens,
    spellings,
    suppressed_tokens,
    unwanted_words,
)
from discovery.proposals.avoid.word_rows import WordStates, begun, likeliest, word_rows, word_states
from discovery.proposals.dictionaries import chosen_dictionary
from discovery.proposals.origin import from_features
from discovery.proposals.settings import ProposeSettings
from interpretops.artifacts.adapter import AdapterSite
from interpretops.artifacts.dictionary.manifest import TrainingRecord
from interpretops.plan import Site
from interpretops.settings import Settings
from interpretops.steering.dictionary_features import DictionaryFeatures

LAYER_SHARES = {"direction": (0.6, 0.75), "gated-edit": (0.7, 0.85), "word-rows": (1.0,)}
STRENGTHS = {
    "direction": (1.0, 2.0, 4.0),
    "sae-feature": (0.0, -1.0),
    "gated-edit": (1.0, 1.3),
    "word-rows": (4.0, 8.0, 12.0),
}
GATE_RATES = (0.02, 0.1)
"""Shares of other tokens that a token gate may open on."""
ROW_RATE = 0.02
"""Share of other tokens on which a learned row fires before training."""
MOST_TOKENS = 6000
MOST_WORD_TOKENS = 60_000
"""More tokens than for a probe, because a row's cut is an extreme quantile."""


@dataclass(frozen=True)
class Candidate:
    """One policy of the grid."""

    settings: dict[str, Any]
    document: dict[str, Any]
    vectors: dict[str, Tensor] = field(default_factory=dict)
    mark: str = ""
    """sha256 of the numbers in the files that the document names."""


class AvoidCandidates:
    """Makes the candidate policies of one method."""

    def __init__(
        self,
        settings: Settings,
        chosen: ProposeSettings,
        contrast: Contrast,
        model: FrozenModel,
        cache: StepCache,
        paths: ProposalPaths,
    ) -> None:
        self.settings, self.chosen, self.contrast = settings, chosen, contrast
        self.model, self.cache, self.paths = model, cache, paths
        self.folder = cache.folder / "draft"
        self.found: dict[str, Any] = {}
        """Results for the run record: AUROCs, features, training."""

    def candidates(
        self, samples: Sequence[Sampled], benign: Sequence[Sampled], text: Sequence[Sampled]
    ) -> list[Candidate]:
        """All policies of the grid. Vectors are in `folder`, adapters in the artifacts."""
        if self.chosen.method == "sae-feature":
            return self._features(samples, benign, text)
        depth = self.model.spec.num_layers
        layers = self.chosen.layers or tuple(
            sorted({min(round(s * depth), depth - 1) for s in LAYER_SHARES[self.chosen.method]})
        )
        self.model.check_layers(layers)
        tokens = self._tokens(layers, samples, [*benign, *text])
        bounds = {layer: round(norm_bound(tokens[f"other/{layer}"].norm(dim=-1), 8.0), 1) for layer in layers}
        if self.chosen.method == "word-rows":
            return self._words(layers, tokens, bounds, samples, [*benign, *text])
        probes = {}
        for layer in layers:
            trait, other = tokens[f"trait/{layer}"], tokens[f"other/{layer}"]
            probes[layer] = fit_probe(trait, other)
            area = auroc(probes[layer].read(trait), probes[layer].read(other))
            self.found[f"probe_auroc_discovery.{layer}"] = round(area, 4)
        if self.chosen.method == "direction":
            return self._directions(layers, tokens, probes, bounds)
        return self._learned(layers, tokens, probes, bounds, [list(samples), [*benign], [*text]])

    def _strengths(self) -> tuple[float, ...]:
        return self.chosen.strengths or STRENGTHS[self.chosen.method]

    def _tokens(
        self, layers: Sequence[int], samples: Sequence[Sampled], others: Sequence[Sampled]
    ) -> dict[str, Tensor]:
        every = [*samples, *others]
        most = MOST_WORD_TOKENS if self.chosen.method == "word-rows" else MOST_TOKENS

        def compute() -> dict[str, Tensor]:
            with meter("propose: activations", len(every), "answers") as progress:
                return trait_tokens(self.model, every, layers, most, progress)

        return self.cache.tensors(f"tokens_{'_'.join(map(str, layers))}", compute)

    def _directions(
        self,
        layers: Sequence[int],
        tokens: dict[str, Tensor],
        probes: dict[int, Probe],
        bounds: dict[int, float],
    ) -> list[Candidate]:
        """Subtract the difference of means at tokens that the probe marks, one layer at a time."""
        file, found = vector_file(self.paths.policy_id), []
        vectors = {f"probe.{layer}": probes[layer].direction for layer in layers}
        for layer in layers:
            vectors[f"direction.{layer}"] = tokens[f"trait/{layer}"].mean(0) - tokens[f"other/{layer}"].mean(
                0
            )
        write_vectors(self.folder / file, vectors, self.model.spec)
        mark = digest({name: vector.tolist() for name, vector in vectors.items()})
        for layer in layers:
            own = {name: vector for name, vector in vectors.items() if name.endswith(f".{layer}")}
            readings = probes[layer].read(tokens[f"other/{layer}"])
            for rate in GATE_RATES:
                condition = {
                    "probe": {"file": file, "tensor": f"probe.{layer}"},
                    "bias": round(probes[layer].bias, 6),
                    "threshold": round(threshold_at(readings, rate), 4),
                }
                gate = {"layer": layer, "conditions": [condition], "max_norm": bounds[layer]}
                for strength in self._strengths():
                    edit = {
                        "type": "steering_vector",
                        "selector": {"layer": layer},
                        "vector": {"file": file, "tensor": f"direction.{layer}"},
                        "strength": -strength,
                        "max_norm": bounds[layer],
                        "gate": "leading-to-it",
                    }
                    setting = {"layer": layer, "gate_rate": rate, "strength": strength}
                    document = self._document([edit], {"leading-to-it": gate})
                    found.append(Candidate(setting, document, own, mark))
        return found

    def _features(
        self, samples: Sequence[Sampled], benign: Sequence[Sampled], text: Sequence[Sampled]
    ) -> list[Candidate]:
        """Scale features down wherever they are active: their own activation is the gate."""
        dictionary = chosen_dictionary(self.settings, self.chosen.dictionary, self.model.spec)
        layer = dictionary.manifest.layer
        tokens = self._tokens([layer], samples, [*benign, *text])
        features = DictionaryFeatures(dictionary.weights)
        active = {kind: features.encode(tokens[f"{kind}/{layer}"]) for kind in ("trait", "other")}
        areas = feature_auroc(active["trait"], active["other"])
        if self.chosen.features is not None:
            ids = list((from_features(self.chosen.features).features or {}).get(-1, ()))
            if wrong := [f for f in ids if f >= dictionary.width]:
                raise DiscoveryError(
                    f"feature {wrong[0]}: {dictionary.manifest.id} has features 0..{dictionary.width - 1}"
                )
        else:
            score = (areas - 0.5).clamp(min=0) * (active["trait"].mean(0) - active["other"].mean(0)).clamp(
                min=0
            )
            ids = [
                int(f)
                for f in score.argsort(descending=True)[: max(self.chosen.counts)]
                if float(score[f]) > 0
            ]
        if not ids:
            raise DiscoveryError(
                f"{dictionary.manifest.id}: no feature is more active where the trait begins"
            )
        self.found["features"] = [
            {
                "id": f,
                "auroc": round(float(areas[f]), 4),
                "active_share_trait": round(float((active["trait"][:, f] > 0).float().mean()), 4),
                "active_share_other": round(float((active["other"][:, f] > 0).float().mean()), 4),
            }
            for f in ids
        ]
        counts = sorted({min(count, len(ids)) for count in self.chosen.counts})
        found = []
        for count in counts:
            for strength in self._strengths():
                edit = {
                    "type": "feature_scale",
                    "selector": {
                        "layer": layer,
                        "point": dictionary.manifest.point,
                        "sae_feature_ids": ids[:count],
                        "dictionary": dictionary.manifest.id,
                    },
                    "scale": strength,
                }
                found.append(Candidate({"features": count, "scale": strength}, self._document([edit], {})))
        return found

    def _learned(
        self,
        layers: Sequence[int],
        tokens: dict[str, Tensor],
        probes: dict[int, Probe],
        bounds: dict[int, float],
        groups: list[list[Sampled]],
    ) -> list[Candidate]:
        """Train the rows, then try them at several strengths."""
        settings = UnlikelihoodSettings(
            tuple(layers), rank=self.chosen.rank, steps=self.chosen.steps, seed=self.chosen.seed
        )
        norms = {layer: float(tokens[f"other/{layer}"].norm(dim=-1).median()) for layer in layers}
        cuts = {
            layer: threshold_at(probes[layer].read(tokens[f"other/{layer}"]), ROW_RATE) for layer in layers
        }
        edit = initial_rows(self.model, settings, probes, cuts, norms, bounds)
        words = trait_vocabulary(self.model, self.contrast.judge)
        with_trait = [s for s in groups[0] if s.begins is not None]
        without = [s for s in groups[0] if s.begins is None]
        checkpoint = self.cache.folder / f"edit_{digest(asdict(settings))[:16]}.safetensors"
        parts = [with_trait, without, groups[1], groups[2]]
        train_edit(self.model, edit, parts, words, settings, checkpoint, self.cache.identity)
        self.found |= {"struck_tokens": len(words), "training": asdict(settings)}
        sites = {}
        for layer in layers:
            read, bias, write = (tensor.numpy().astype(np.float32) for tensor in edit.rows(layer))
            sites[Site(layer, "resid_post")] = AdapterSite(read, write, bias, "relu", bounds[layer])
        method = "ReLU rows, distilled from the model with unwanted words made unlikely"
        self._write_adapter(sites, TrainingRecord(method=method, steps=settings.steps))
        mark = digest([value.tolist() for _, value in edit.named_parameters()])
        return self._gated({"layers": list(layers), "rank": settings.rank, "steps": settings.steps}, mark)

    def _words(
        self,
        layers: Sequence[int],
        tokens: dict[str, Tensor],
        bounds: dict[int, float],
        samples: Sequence[Sampled],
        others: Sequence[Sampled],
    ) -> list[Candidate]:
        """Compute rows against the class's words at each layer, then try them at several strengths."""
        model, judge, seed = self.model, self.contrast.judge, self.chosen.seed
        words = unwanted_words(self.contrast, [model.decode(sample.ids) for sample in samples])
        used = Counter(token for sample in (*samples, *others) for token in sample.ids)
        pieces = suppressed_tokens(spellings(model, judge, words), used)
        found = self._word_states(layers, pieces, begun(samples, pieces, seed))
        order = likeliest(found, len(pieces), self.chosen.rank)
        sites, mark = {}, []
        for layer in layers:
            rows = word_rows(model, layer, pieces, order, found, tokens[f"other/{layer}"])
            read, write, bias = (t.numpy().astype(np.float32) for t in (rows.read, rows.write, rows.bias))
            sites[Site(layer, "resid_post")] = AdapterSite(read, write, bias, "relu", bounds[layer])
            mark += [read.tolist(), write.tolist(), bias.tolist()]
        self.found |= {"words": words, "struck_tokens": len(order), "left_out": len(pieces) - len(order)}
        self._write_adapter(
            sites, TrainingRecord(method="ReLU rows against words, computed without training")
        )
        return self._gated({"layers": list(layers), "rank": len(order)}, digest(mark))

    def _word_states(
        self, layers: Sequence[int], pieces: Sequence[SuppressedToken], places: Sequence[tuple[int, Tokens]]
    ) -> WordStates:
        def compute() -> dict[str, Tensor]:
            with meter("propose: words", len(places), "places") as progress:
                found = word_states(self.model, places, pieces, layers, progress)
            states = {str(layer): x for layer, x in found.states.items()}
            return states | {"piece": found.piece, "likely": found.likely}

        kept = self.cache.tensors(f"words_{digest([layers, places])[:16]}", compute)
        return WordStates({layer: kept[str(layer)] for layer in layers}, kept["piece"], kept["likely"])

    def _write_adapter(self, sites: Mapping[Site, AdapterSite], made: TrainingRecord) -> None:
        """Write the rows with their manifest and run record to the artifacts."""
        record = run_record("propose", self.chosen.seed, self.chosen.record(), self.contrast.record)
        write_rows(self.paths, sites, self.contrast, self.model.spec, made, record | {"found": self.found})

    def _gated(self, setting: dict[str, Any], mark: str) -> list[Candidate]:
        """The adapter just written, at each strength."""
        edit = {"type": "lora_gate", "selector": {"block": "resid"}, "adapter": self.paths.policy_id}
        return [
            Candidate(setting | {"alpha": alpha}, self._document([edit | {"alpha": alpha}], {}), {}, mark)
            for alpha in self._strengths()
        ]

    def _document(self, interventions: list[dict[str, Any]], gates: dict[str, Any]) -> dict[str, Any]:
        meta = {
            "id": self.paths.policy_id,
            "description": f"Keeps {self.contrast.name} out of answers, token by token",
            "target_class": self.contrast.name,
        }
        document: dict[str, Any] = {"meta": meta}
        if gates:
            document["gates"] = gates
        return document | {"interventions": interventions}
