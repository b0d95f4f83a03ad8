"""The graph of a decoder: its nodes in computation order, its edges, and connected subgraphs.

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
    """Whether a layer's MLP reads the same input as its heads (GPT-NeoX) and not their outputs."""

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
        """Every edge of the model: heads read the outputs of earlier layers; an MLP also reads its own
        layer's heads, unless they run in parallel."""
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
    """Only the edges on a path from the first node (``input``) to the last (``logits``)."""
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
    """Edges (target, source) in the order in which a circuit grows backwards from the logits.

    The next edge is the one with the highest absolute score that enters a node of the circuit; its source
    joins the circuit. This is the greedy search of Hanna et al. (2024, arXiv:2403.17806).
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
    """The largest connected circuit of at most ``most`` edges along a growth order.

    Dead ends are pruned. Longer growth never loses an edge, so bisection finds the length, and circuits of
    the same order are nested.
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
    """The circuit of these edges [E, 2] (target, source), with dead ends pruned."""
    edges = np.zeros((graph.size, graph.size), bool)
    edges[places[:, 0], places[:, 1]] = True
    return without_dead_ends(edges)


def random_order(graph: Graph, seed: int) -> list[tuple[int, int]]:
    """The growth order under random scores: its circuits are connected and can have any size."""
    return growth_order(graph, np.random.default_rng(seed).random((graph.size, graph.size)))
