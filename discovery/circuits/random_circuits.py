"""Connected random circuits, beside which a found one is judged."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from discovery.circuits.graph import Edges, Graph, prune, random_order


class RandomCircuits:
    """Random circuits by number and sizes, always the same ones for a seed; each is drawn once."""

    def __init__(self, graph: Graph, seed: int) -> None:
        self.graph, self.seed = graph, seed
        self._drawn: dict[tuple[int, ...], list[npt.NDArray[np.uint8]]] = {}
        """In bits: a search has hundreds, and drawing takes long."""

    def of_sizes(self, number: int, counts: Sequence[int]) -> list[Edges]:
        """One for each most number of edges, nested, of the random order of a number."""
        wanted = (number, *counts)
        if wanted not in self._drawn:
            order = random_order(self.graph, 1_000_003 + self.seed * 1009 + number)
            self._drawn[wanted] = [np.packbits(prune(self.graph, order, most), axis=1) for most in counts]
        size = self.graph.size
        return [np.unpackbits(kept, axis=1, count=size).astype(bool) for kept in self._drawn[wanted]]
