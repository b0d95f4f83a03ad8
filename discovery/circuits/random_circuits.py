"""Connected random circuits, the baseline for a found circuit."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from discovery.circuits.graph import Edges, Graph, prune, random_order


class RandomCircuits:
    """Random circuits by number and sizes; reproducible for a seed, and each drawn only once."""

    def __init__(self, graph: Graph, seed: int) -> None:
        self.graph, self.seed = graph, seed
        self._drawn: dict[tuple[int, ...], list[npt.NDArray[np.uint8]]] = {}
        """Stored as bits: a search has hundreds of circuits, and drawing them is slow."""

    def of_sizes(self, number: int, counts: Sequence[int]) -> list[Edges]:
        """One circuit for each maximum number of edges, nested, from the random order of this number."""
        wanted = (number, *counts)
        if wanted not in self._drawn:
            order = random_order(self.graph, 1_000_003 + self.seed * 1009 + number)
            self._drawn[wanted] = [np.packbits(prune(self.graph, order, most), axis=1) for most in counts]
        size = self.graph.size
        return [np.unpackbits(kept, axis=1, count=size).astype(bool) for kept in self._drawn[wanted]]
