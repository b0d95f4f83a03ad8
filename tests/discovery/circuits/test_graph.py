"""The graph, growing circuits in it, and how alike they are."""

from itertools import pairwise

import numpy as np
import pytest

from discovery.circuits.graph import Graph, growth_order, prune, random_order, without_dead_ends
from discovery.circuits.stability import (
    chance_jaccard,
    inner_nodes,
    jaccard_interval,
    mean_chance,
    mean_jaccard,
    resample,
)

GRAPH = Graph(layers=4, heads=3)


def test_edges_lead_forward_only() -> None:
    """2 + L(H + 1) nodes; heads of a layer do not read each other, its MLP reads them, logits read all."""
    graph = Graph(layers=2, heads=2)
    names = [graph.name(index) for index in range(graph.size)]
    assert names == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits"]
    assert graph.allowed.sum(axis=1).tolist() == [0, 1, 1, 3, 4, 4, 6, 7]
    assert graph.edge_count == 26


def test_dead_ends_are_cut() -> None:
    """An edge from a node that nothing feeds, or to one that nothing reads, is not in the circuit."""
    graph = Graph(layers=2, heads=1)  # input a0.h0 m0 a1.h0 m1 logits
    edges = np.zeros((graph.size, graph.size), bool)
    edges[1, 0] = edges[5, 1] = True
    edges[5, 4] = True  # nothing feeds m1
    edges[3, 0] = True  # nothing reads a1.h0
    assert np.argwhere(without_dead_ends(edges)).tolist() == [[1, 0], [5, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_pruned_circuits_are_connected_nested_and_no_larger(seed: int) -> None:
    """Whatever the scores: at most N edges, each on a way from input to logits, smaller within larger."""
    order = random_order(GRAPH, seed)
    assert sorted(order) == sorted(map(tuple, np.argwhere(GRAPH.allowed).tolist()))
    before = np.zeros_like(GRAPH.allowed)
    for most in (1, 3, 10, 40, GRAPH.edge_count):
        edges = prune(GRAPH, order, most)
        assert edges.sum() <= most
        assert (without_dead_ends(edges) == edges).all()
        assert (before <= edges).all()
        before = edges
    assert (before == GRAPH.allowed).all()


def test_strong_edges_are_taken_first() -> None:
    """The strongest way from input to logits is the first circuit, whatever the signs."""
    scores = np.zeros((GRAPH.size, GRAPH.size))
    way = [0, 2, 7, GRAPH.logits]
    for source, target in pairwise(way):
        scores[target, source] = -1 if source else 1
    edges = prune(GRAPH, growth_order(GRAPH, scores), 3)
    assert np.argwhere(edges).tolist() == [[2, 0], [7, 2], [GRAPH.logits, 7]]
    assert np.flatnonzero(inner_nodes(edges)).tolist() == [1, 6]


def test_chance_level_is_that_of_drawn_sets() -> None:
    """The formula gives the mean Jaccard of sets that are really drawn; full or empty ones are alike."""
    rng = np.random.default_rng(0)
    total, sizes = 40, (12, 7)
    drawn = []
    for _ in range(3000):
        one, other = np.zeros(total, bool), np.zeros(total, bool)
        one[rng.choice(total, sizes[0], replace=False)] = True
        other[rng.choice(total, sizes[1], replace=False)] = True
        drawn.append(mean_jaccard([one, other]))
    assert chance_jaccard(total, *sizes) == pytest.approx(np.mean(drawn), abs=0.006)
    assert chance_jaccard(2, 1, 1) == pytest.approx(0.5)
    assert chance_jaccard(40, 40, 40) == pytest.approx(1)
    assert chance_jaccard(40, 0, 0) == 1
    assert chance_jaccard(45_000, 900, 900) == pytest.approx(900 / 45_000 / 2, rel=0.05)
    assert mean_chance(40, [7, 12, 7]) == pytest.approx(
        (2 * chance_jaccard(40, 7, 12) + chance_jaccard(40, 7, 7)) / 3
    )


def test_interval_of_stability_covers_the_mean_and_counts_no_set_with_itself() -> None:
    """Disjoint sets stay at 0 however often one is drawn; of sets that differ the interval holds the mean."""
    apart = [np.eye(8, dtype=bool)[index] for index in range(8)]
    assert jaccard_interval(apart, seed=0) == (0.0, 0.0)
    sets = [np.random.default_rng(index).random(200) < 0.3 for index in range(20)]
    low, high = jaccard_interval(sets, seed=0)
    assert low < mean_jaccard(sets) < high
    assert high - low < 0.1
    assert jaccard_interval(sets, seed=0) == (low, high)


def test_jaccard_of_equal_and_of_disjoint_sets() -> None:
    """Equal sets: 1; disjoint: 0; one shared of three: 1/3."""
    a, b, c = (np.isin(np.arange(4), members) for members in ([0, 1], [2, 3], [1, 2]))
    assert mean_jaccard([a, a, a]) == 1
    assert mean_jaccard([a, b]) == 0
    assert mean_jaccard([a, c]) == pytest.approx(1 / 3)


def test_resamples_repeat_by_seed_and_draw() -> None:
    """A seed sees four fifths of the pairs; the same seed and draw give the same resample, others another."""
    assert len(set(resample(100, 3, 0)) | set(resample(100, 3, 1)) | set(resample(100, 3, 2))) <= 80
    assert resample(100, 3, 1).tolist() == resample(100, 3, 1).tolist()
    assert resample(100, 3, 1).tolist() != resample(100, 3, 2).tolist()
    assert resample(1, 0, 0).tolist() == [0]
