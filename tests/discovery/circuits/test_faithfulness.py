"""Faithfulness: the known circuit carries the behaviour under both ablations, random ones do not."""

import numpy as np
import pytest

from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.faithfulness import Evaluator, areas
from discovery.circuits.graph import Edges, prune, random_order
from discovery.circuits.pairs import Pair
from discovery.errors import DiscoveryError
from interpretops.circuit import Ablation

CIRCUIT = (("input", "a0.h1"), ("a0.h1", "a2.h0"), ("a2.h0", "logits"))


def known_edges(decoder: GraphDecoder) -> Edges:
    index = {decoder.graph.name(node): node for node in range(decoder.graph.size)}
    edges = np.zeros_like(decoder.graph.allowed)
    for source, target in CIRCUIT:
        edges[index[target], index[source]] = True
    return edges


@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
def test_known_circuit_is_faithful_and_random_ones_are_not(
    known: GraphDecoder, pairs: list[Pair], ablation: Ablation
) -> None:
    """Three right edges of 82 keep the metric; each of 20 connected random circuits of 9 edges is worse."""
    evaluator = Evaluator(known, pairs, "logit_diff", ablation, batch=8)
    random = [prune(known.graph, random_order(known.graph, seed), 9) for seed in range(20)]
    values = evaluator.metrics([known_edges(known), *random])
    own, *others = map(evaluator.faithfulness, values)
    assert own == pytest.approx(1, abs=0.1)
    assert all(abs(1 - other) > abs(1 - own) for other in others)
    assert np.mean(others) < 0.5


@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
def test_whole_model_is_one_and_nothing_is_zero(
    noisy: GraphDecoder, pairs: list[Pair], ablation: Ablation
) -> None:
    """With all edges the faithfulness is 1, with none 0."""
    evaluator = Evaluator(noisy, pairs, "log_odds", ablation, batch=5)
    values = evaluator.metrics([noisy.graph.allowed, np.zeros_like(noisy.graph.allowed)])
    assert [evaluator.faithfulness(value) for value in values] == pytest.approx([1, 0], abs=1e-5)


def test_missing_edge_of_the_known_circuit_breaks_it(known: GraphDecoder, pairs: list[Pair]) -> None:
    """Any one of the three edges ablated in the whole model takes the contrast away."""
    evaluator = Evaluator(known, pairs, "logit_diff", "counterfactual", batch=8)
    for target, source in np.argwhere(known_edges(known)).tolist():
        edges = known.graph.allowed.copy()
        edges[target, source] = False
        assert evaluator.faithfulness(evaluator.metrics([edges])[0]) < 0.1


def test_pairs_without_a_contrast_are_refused(known: GraphDecoder) -> None:
    """Prompts between which the metric does not differ end in one line."""
    same = [Pair((1, 0, 15), (1, 0, 15), (1,), (8,))]
    with pytest.raises(DiscoveryError, match="shows no contrast"):
        Evaluator(known, same, "logit_diff", "counterfactual", batch=8)


def test_areas_by_hand() -> None:
    """CPR and CMD of a step curve, of a perfect one, and of one that overshoots, worked out by hand."""
    assert areas((0.5, 1.0), (1.0, 1.0)).cpr == pytest.approx(0.75)
    assert areas((0.5, 1.0), (1.0, 1.0)).cmd == pytest.approx(0.25)
    over = areas((0.5, 1.0), (1.5, 1.0))
    assert over.cpr == pytest.approx(0.5 * (0 + 1.5) / 2 + 0.5 * (1.5 + 1.0) / 2)
    assert over.cmd == pytest.approx(0.5 * (1 + 0.5) / 2 + 0.5 * 0.5 / 2)
