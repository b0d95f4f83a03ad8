"""The graph of a decoder: its nodes in the order they compute, its edges, and connected subgraphs.

N nodes: ``input``, then for each layer its heads and its MLP, then ``logits``. Sets of edges are boolean
matrices [N, N], first index the target, second the source.
"""

import heapq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from interpretops.circuit import ComponentKind

Edges = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Graph:
    """All nodes and edges of a decoder with L layers of H heads."""

    layers: int
    heads: int
    parallel: bool = False
    """A layer's MLP reads what its heads read (GPT-NeoX), and not what they wrote too."""

    @property
    def size(self) -> int:
        return 2 + self.layers * (self.heads + 1)

    @property
    def logits(self) -> int:
        return self.size - 1

    def first_head(self, layer: int) -> int:
        """Index of a layer's head 0, and the number of nodes that its heads can read from."""
        return 1 + layer * (self.heads + 1)

    def mlp(self, layer: int) -> int:
        return self.first_head(layer) + self.heads

    def place(self, index: int) -> tuple[ComponentKind, int | None, int | None]:
        """Kind, layer and head of a node."""
        if index == 0:
            return "input", None, None
        if index == self.logits:
            return "logits", None, None
        layer, offset = divmod(index - 1, self.heads + 1)
        return ("mlp", layer, None) if offset == self.heads else ("head", layer, offset)

    def name(self, index: int) -> str:
        kind, layer, head = self.place(index)
        return f"a{layer}.h{head}" if kind == "head" else f"m{layer}" if kind == "mlp" else kind

    def mlp_reads(self, layer: int) -> int:
        """The number of nodes that a layer's MLP can read from."""
        return self.first_head(layer) if self.parallel else self.mlp(layer)

    @cached_property
    def allowed(self) -> Edges:
        """Every edge of the model: heads read what earlier layers wrote, an MLP its own layer's heads too,
        unless these are parallel."""
        found = np.zeros((self.size, self.size), bool)
        for layer in range(self.layers):
            start = self.first_head(layer)
            found[start : start + self.heads, :start] = True
            found[self.mlp(layer), : self.mlp_reads(layer)] = True
        found[self.logits, : self.logits] = True
        return found

    @cached_property
    def edge_count(self) -> int:
        return int(self.allowed.sum())


def without_dead_ends(edges: Edges) -> Edges:
    """Of the edges those that lie on a way from the first node (``input``) to the last (``logits``)."""
    size = len(edges)
    fed, heard = np.zeros(size, bool), np.zeros(size, bool)
    fed[0], heard[-1] = True, True
    for node in range(1, size):
        fed[node] = bool((edges[node] & fed).any())
    for node in range(size - 2, -1, -1):
        heard[node] = bool((edges[:, node] & heard).any())
    alive = fed & heard
    kept: Edges = edges & alive[:, None] & alive[None, :]
    return kept


def growth_order(graph: Graph, scores: Scores) -> list[tuple[int, int]]:
    """Edges (target, source) in the order in which a circuit grows from the logits.

    Of the edges that enter a node of the circuit, the one of the highest absolute score comes next and
    brings its source along: the greedy search of Hanna et al. (2024, arXiv:2403.17806).
    """
    waiting: list[tuple[float, int, int]] = []
    reached = {graph.logits}
    order: list[tuple[int, int]] = []

    def offer(target: int) -> None:
        for source in np.flatnonzero(graph.allowed[target]):
            heapq.heappush(waiting, (-abs(float(scores[target, source])), target, int(source)))

    offer(graph.logits)
    while waiting:
        _, target, source = heapq.heappop(waiting)
        order.append((target, source))
        if source not in reached:
            reached.add(source)
            offer(source)
    return order


def prune(graph: Graph, order: list[tuple[int, int]], most: int) -> Edges:
    """The largest connected circuit of at most ``most`` edges along a growth order; every edge counts.

    Dead ends are cut, and as longer growth never loses an edge, the length is found by bisection. Circuits
    of one order are nested.
    """
    places = np.array(order, np.intp).reshape(-1, 2)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if int(_grown(graph, places[:middle]).sum()) <= most:
            low = middle
        else:
            high = middle - 1
    return _grown(graph, places[:low])


def _grown(graph: Graph, places: npt.NDArray[np.intp]) -> Edges:
    """The circuit of some edges [E, 2] (target, source), dead ends cut."""
    edges = np.zeros((graph.size, graph.size), bool)
    edges[places[:, 0], places[:, 1]] = True
    return without_dead_ends(edges)


def random_order(graph: Graph, seed: int) -> list[tuple[int, int]]:
    """The growth order under random scores: its circuits are connected and can be cut to any size."""
    return growth_order(graph, np.random.default_rng(seed).random((graph.size, graph.size)))
