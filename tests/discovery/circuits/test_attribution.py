"""Attribution: EAP-IG finds a known circuit, is complete, and agrees with exact patching."""

import numpy as np
import pytest
import torch

from discovery.circuits.attribution import edge_scores, node_scores, patching_effects
from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.graph import growth_order, prune
from discovery.circuits.metric import METRICS, Metric, measure
from discovery.circuits.pairs import Pair, batches

CIRCUIT = {("input", "a0.h1"), ("a0.h1", "a2.h0"), ("a2.h0", "logits")}


def scored(
    decoder: GraphDecoder, pairs: list[Pair], metric: Metric = "logit_diff", steps: int = 5
) -> torch.Tensor:
    """Scores of all pairs [P, N, N], in their order."""
    found: dict[int, torch.Tensor] = {}
    for indices in batches(pairs, 8):
        part = edge_scores(decoder, [pairs[i] for i in indices], metric, steps)
        found |= dict(zip(indices, part, strict=True))
    return torch.stack([found[index] for index in range(len(pairs))])


def contrast(decoder: GraphDecoder, pair: Pair, metric: Metric) -> float:
    """M(x) - M(x') from the plain Hugging Face forward pass."""
    both = torch.tensor([pair.clean, pair.corrupted])
    with torch.no_grad():
        logits = decoder.network(input_ids=both).logits[:, -1]
    clean, corrupted = measure(metric, logits, [pair, pair])
    return float(clean - corrupted)


def test_known_circuit_is_found_exactly(known: GraphDecoder, pairs: list[Pair]) -> None:
    """The three strongest connected edges are the three by which the model was built."""
    scores = scored(known, pairs).mean(0).double().numpy()
    edges = prune(known.graph, growth_order(known.graph, scores), 3)
    names = {(known.graph.name(s), known.graph.name(t)) for t, s in np.argwhere(edges).tolist()}
    assert names == CIRCUIT
    outside = np.abs(np.where(edges, 0, scores)).max()
    assert np.abs(scores[edges]).min() > 5 * outside


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_the_input_sum_to_the_contrast(
    noisy: GraphDecoder, pairs: list[Pair], metric: Metric
) -> None:
    """Completeness: the edges that leave the embedding sum to M(x) - M(x'), the closer the more steps."""
    expected = torch.tensor([contrast(noisy, pair, metric) for pair in pairs])
    errors = []
    for steps in (5, 20):
        total = node_scores(scored(noisy, pairs, metric, steps))[:, 0]
        errors.append(float((total - expected).abs().max() / expected.abs().max()))
    assert errors[0] < 0.1
    assert errors[1] < 0.01


def test_exact_patching_agrees_with_attribution(noisy: GraphDecoder, pairs: list[Pair]) -> None:
    """Nodes that matter have the same sign, and the two strongest are the same, as by exact patching."""
    nodes = list(range(1, noisy.graph.logits))
    exact = torch.stack([patching_effects(noisy, [pair], "logit_diff", nodes)[0] for pair in pairs]).mean(0)
    approximate = node_scores(scored(noisy, pairs)).mean(0)[1:-1]
    strongest = exact.abs().argsort(descending=True)
    names = {noisy.graph.name(nodes[index]) for index in strongest[:2].tolist()}
    assert names == {"a0.h1", "a2.h0"}
    assert set(approximate.abs().argsort(descending=True)[:2].tolist()) == set(strongest[:2].tolist())
    large = exact.abs() > 0.05 * exact.abs().max()
    assert bool((exact[large].sign() == approximate[large].sign()).all())
    assert float(torch.corrcoef(torch.stack([exact, approximate]))[0, 1]) > 0.9


def test_patching_the_embedding_gives_the_whole_contrast(noisy: GraphDecoder, pairs: list[Pair]) -> None:
    """With the input node patched the run is the corrupted one."""
    effect = patching_effects(noisy, pairs[:1], "logit_diff", [0])
    assert float(effect[0, 0]) == pytest.approx(contrast(noisy, pairs[0], "logit_diff"), abs=1e-5)
