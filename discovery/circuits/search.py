"""The job `search`: turns contrast pairs into a circuit; saves every slow step, so a run can resume."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discovery.circuits.attribution import edge_scores, node_scores, patching_effects
from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.faithfulness import SIZES, Evaluator, areas, random_summary
from discovery.circuits.feature_search import FeatureSearch, FeatureSettings
from discovery.circuits.features import FeatureSite
from discovery.circuits.graph import Edges, Scores, growth_order, prune
from discovery.circuits.pairs import Pair, batches
from discovery.circuits.random_circuits import RandomCircuits
from discovery.circuits.search_settings import SearchSettings
from discovery.circuits.stability import (
    inner_nodes,
    jaccard_interval,
    mean_chance,
    mean_jaccard,
    resample,
)
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.jobs.progress import meter
from discovery.jobs.step_cache import StepCache, numbers, text
from interpretops.artifacts.dictionary import Dictionary
from interpretops.circuit import (
    Ablation,
    Circuit,
    CircuitEdge,
    CircuitNode,
    DataFile,
    Faithfulness,
    Method,
    Stability,
)
from interpretops.ids import new_id

ABLATIONS: tuple[Ablation, ...] = ("counterfactual", "mean")


class CircuitSearch:
    """One run: attribution on the discovery pairs, pruning, exact measures on the evaluation pairs.

    Finished steps are in a folder of ``work`` named by model, pairs and settings, so that other runs never
    use them.
    """

    def __init__(
        self,
        model: FrozenModel,
        discovery: Sequence[Pair],
        evaluation: Sequence[Pair],
        settings: SearchSettings,
        work: Path,
        dictionaries: Sequence[Dictionary] = (),
    ) -> None:
        self.model, self.settings = model, settings
        self.discovery, self.evaluation = discovery, evaluation
        self.decoder = GraphDecoder(model)
        self.graph = self.decoder.graph
        if settings.edges > self.graph.edge_count:
            raise DiscoveryError(
                f"edges = {settings.edges}, but {model.spec.name} has {self.graph.edge_count} edges"
            )
        self.sites = [FeatureSite(self.decoder, dictionary) for dictionary in dictionaries]
        layers = [site.manifest.layer for site in self.sites]
        if len(set(layers)) < len(layers):
            names = ", ".join(site.manifest.id for site in self.sites)
            raise DiscoveryError(
                f"dictionaries {names}: two have the same layer; search them one after another"
            )
        identity = [
            model.spec.fingerprint,
            str(model.network.dtype),
            [asdict(pair) for pair in discovery],
            [asdict(pair) for pair in evaluation],
            {name: value for name, value in asdict(settings).items() if name != "features"},
        ]
        self.random = RandomCircuits(self.graph, settings.seed)
        run = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.steps = StepCache(work / run, run)

    def run(self, target_class: str, data: DataFile, record: dict[str, Any]) -> Circuit:
        """Run the steps that are not finished, and return the circuit."""
        scores = self._attribute()
        mean = self._dense(scores.mean(0))
        edges = self._prune(mean)
        if not edges.any():
            raise DiscoveryError(
                f"edges = {self.settings.edges} are too few to lead from the input to the logits; allow more"
            )
        found = [self._faithfulness(ablation, mean, edges) for ablation in ABLATIONS]
        ccs = self._contributions(edges, found[0])
        of_features = [
            self._features(site).run(found[0].full_metric - found[0].empty_metric) for site in self.sites
        ]
        return Circuit(
            id=self._id(target_class, data),
            target_class=target_class,
            model=self.model.spec.name,
            fingerprint=self.model.spec.fingerprint,
            metric=self.settings.metric,
            method=Method(
                steps=self.settings.steps,
                wanted_edges=self.settings.edges,
                edges_of_model=self.graph.edge_count,
                nodes_of_model=self.graph.size,
            ),
            data=(data,),
            seeds=self._seeds(),
            nodes=(*self._nodes(edges, mean, ccs), *(node for nodes, _ in of_features for node in nodes)),
            edges=tuple(
                CircuitEdge(source=self.graph.name(s), target=self.graph.name(t), score=float(mean[t, s]))
                for t, s in sorted(np.argwhere(edges).tolist(), key=lambda e: -abs(mean[e[0], e[1]]))
            ),
            dictionaries=tuple(record for _, record in of_features),
            faithfulness=tuple(found),
            stability=self._stability(scores, edges),
            run=record,
        )

    def _id(self, target_class: str, data: DataFile) -> str:
        """The circuit's saved id: the same command run again writes the same file."""
        weights = [site.manifest.weights.sha256 for site in self.sites]
        of = json.dumps([target_class, data.model_dump(), weights, self.settings.features])
        name = f"id-{hashlib.sha256(of.encode()).hexdigest()[:16]}"
        return self.steps.json(name, partial(new_id, "cx"), text)

    def _seeds(self) -> tuple[int, ...]:
        return tuple(range(self.settings.seed, self.settings.seed + self.settings.seeds))

    def _features(self, site: FeatureSite) -> FeatureSearch:
        settings = FeatureSettings(
            metric=self.settings.metric,
            steps=self.settings.steps,
            seeds=self._seeds(),
            resamples=self.settings.resamples,
            random_sets=self.settings.random_circuits,
            batch=self.settings.batch,
            most=self.settings.features,
        )
        return FeatureSearch(site, self.discovery, self.evaluation, settings, self.steps)

    def _attribute(self) -> Tensor:
        """EAP-IG scores [P, E] of every pair and allowed edge; one file per batch."""
        parts = list(batches(self.discovery, self.settings.batch))
        scores = torch.zeros(len(self.discovery), self.graph.edge_count)
        with meter("search: attribution", len(self.discovery), "pairs") as progress:
            for number, indices in enumerate(parts):
                part = partial(self._batch_scores, indices)
                scores[indices] = self.steps.tensor(f"scores-{number:04d}", part)
                progress.advance(len(indices))
        return scores

    def _batch_scores(self, indices: Sequence[int]) -> Tensor:
        pairs = [self.discovery[index] for index in indices]
        scores = edge_scores(self.decoder, pairs, self.settings.metric, self.settings.steps)
        if not bool(torch.isfinite(scores).all()):
            raise DiscoveryError(f"pairs {list(indices)}: attribution is not finite; check the model")
        return scores[:, torch.from_numpy(self.graph.allowed)]

    def _dense(self, scores: Tensor) -> Scores:
        dense = np.zeros((self.graph.size, self.graph.size))
        dense[self.graph.allowed] = scores.double().numpy()
        return dense

    def _faithfulness(self, ablation: Ablation, mean: Scores, edges: Edges) -> Faithfulness:
        evaluator = Evaluator(
            self.decoder, self.evaluation, self.settings.metric, ablation, self.settings.batch
        )
        order = growth_order(self.graph, mean)
        counts = [round(share * self.graph.edge_count) for share in SIZES[:-1]]
        circuits = [prune(self.graph, order, count) for count in counts]
        actual = [int(circuit.sum()) for circuit in circuits]
        size = int(edges.sum())
        count = self.settings.random_circuits
        pairs = len(self.evaluation)
        with meter(f"search: {ablation} ablation", (count + 1) * pairs, "pairs") as progress:
            own = self.steps.json(f"{ablation}-found", lambda: evaluator.metrics([*circuits, edges]), numbers)
            progress.advance(pairs)
            others = []
            for number in range(count):
                measured = partial(self._random_metrics, evaluator, number, (*actual, size))
                others.append(self.steps.json(f"{ablation}-random-{number:03d}", measured, numbers))
                progress.advance(pairs)
        curve = [evaluator.faithfulness(value) for value in own[:-1]] + [1.0]
        area = areas(SIZES, curve)
        return Faithfulness(
            ablation=ablation,
            full_metric=evaluator.full,
            empty_metric=evaluator.empty,
            circuit_metric=own[-1],
            faithfulness=evaluator.faithfulness(own[-1]),
            sizes=SIZES,
            edges=(*actual, self.graph.edge_count),
            curve=tuple(curve),
            cpr=area.cpr,
            cmd=area.cmd,
            random=random_summary(evaluator, own[-1], others),
        )

    def _random_metrics(self, evaluator: Evaluator, number: int, counts: Sequence[int]) -> list[float]:
        return evaluator.metrics(self.random.of_sizes(number, counts))

    def _contributions(self, edges: Edges, counterfactual: Faithfulness) -> dict[int, float]:
        """Causal Contribution Score of every head and MLP of the circuit.

        CCS(u) = (m(M) - m(M without u)) / (m(M) - m(empty)): the share of the contrast that is lost if only u
        is replaced by its value on the corrupted prompt and everything after it is recomputed.
        """
        nodes = [int(index) + 1 for index in np.flatnonzero(inner_nodes(edges))]

        def compute() -> list[float]:
            total = torch.zeros(len(nodes))
            with meter("search: contributions", len(self.evaluation), "pairs") as progress:
                for indices in batches(self.evaluation, self.settings.batch):
                    pairs = [self.evaluation[index] for index in indices]
                    total += patching_effects(self.decoder, pairs, self.settings.metric, nodes).sum(0)
                    progress.advance(len(indices))
            return [float(value) for value in total / len(self.evaluation)]

        contrast = counterfactual.full_metric - counterfactual.empty_metric
        effects = self.steps.json("contributions", compute, numbers) if nodes else []
        return {node: effect / contrast for node, effect in zip(nodes, effects, strict=True)}

    def _nodes(self, edges: Edges, mean: Scores, ccs: dict[int, float]) -> tuple[CircuitNode, ...]:
        scores = node_scores(torch.from_numpy(mean))
        found = []
        for index in (0, *ccs, self.graph.logits):
            kind, layer, head = self.graph.place(index)
            found.append(
                CircuitNode(
                    id=self.graph.name(index),
                    kind=kind,
                    layer=layer,
                    head=head,
                    score=float(scores[index]),
                    ccs=ccs.get(index),
                )
            )
        return tuple(found)

    def _stability(self, scores: Tensor, edges: Edges) -> Stability:
        draws = [(seed, draw) for seed in self._seeds() for draw in range(self.settings.resamples)]
        found = []
        with meter("search: stability", len(draws), "resamples") as progress:
            for seed, draw in draws:
                chosen = torch.from_numpy(resample(len(scores), seed, draw))
                mean = self._dense(scores[chosen].mean(0))
                found.append(self._prune(mean))
                progress.advance(1)
        nodes = [inner_nodes(circuit) for circuit in found]
        wordings = self._by_paraphrase(scores)
        several = len(wordings) > 1
        size = int(edges.sum())
        random = [self.random.of_sizes(number, (size,))[0] for number in range(min(10, len(found)))]
        return Stability(
            resamples_per_seed=self.settings.resamples,
            circuits=len(found),
            edge_jaccard=mean_jaccard(found),
            edge_interval=jaccard_interval(found, self.settings.seed),
            edge_chance=mean_chance(self.graph.edge_count, [int(circuit.sum()) for circuit in found]),
            edge_random=mean_jaccard(random),
            node_jaccard=mean_jaccard(nodes),
            node_chance=mean_chance(self.graph.size - 2, [int(used.sum()) for used in nodes]),
            paraphrases=len(wordings),
            paraphrase_edge_jaccard=mean_jaccard(wordings) if several else None,
            paraphrase_node_jaccard=mean_jaccard(list(map(inner_nodes, wordings))) if several else None,
        )

    def _by_paraphrase(self, scores: Tensor) -> list[Edges]:
        """The circuit of each single wording's pairs; empty if the pairs do not name their wordings."""
        names = sorted({pair.paraphrase for pair in self.discovery if pair.paraphrase})
        found = []
        for name in names:
            rows = [row for row, pair in enumerate(self.discovery) if pair.paraphrase == name]
            found.append(self._prune(self._dense(scores[rows].mean(0))))
        return found

    def _prune(self, mean: Scores) -> Edges:
        return prune(self.graph, growth_order(self.graph, mean), self.settings.edges)
