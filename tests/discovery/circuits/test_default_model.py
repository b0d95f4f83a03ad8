"""Known ground on a real model: indirect object identification in the default model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from discovery.circuits.attribution import edge_scores, node_scores, patching_effects
from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.faithfulness import Evaluator
from discovery.circuits.graph import growth_order, prune, random_order
from discovery.circuits.pairs import TextPair, encode_pairs
from discovery.circuits.search_settings import PairFormat
from discovery.frozen_model import FrozenModel

SENTENCES = (
    ("When Mary and John went to the store, {} gave a drink to", "Mary", "John"),
    ("When Tom and James went to the park, {} gave a ball to", "Tom", "James"),
)


@pytest.mark.slow
def test_ioi_circuit_is_found_in_the_default_model(default_model_dir: Path) -> None:
    """The heads that matter most do so by exact patching, and the circuit beats random ones of its size."""
    model = FrozenModel(default_model_dir, torch.float32)
    decoder, pair_format = GraphDecoder(model), PairFormat()
    texts = [
        TextPair("here", text.format(said), text.format(other), (f" {other}",), (f" {said}",))
        for text, said, other in SENTENCES
    ]
    pairs, skipped = encode_pairs(model, texts, pair_format)
    assert skipped == 0
    scores = torch.stack([edge_scores(decoder, [pair], "logit_diff", 5)[0] for pair in pairs]).mean(0)
    by_node = node_scores(scores)
    heads = [
        node
        for node in by_node.abs().argsort(descending=True).tolist()
        if decoder.graph.place(node)[2] is not None
    ][:6]
    exact = torch.stack([patching_effects(decoder, [pair], "logit_diff", heads)[0] for pair in pairs]).mean(0)
    assert bool((exact.sign() == by_node[heads].sign()).all())
    evaluator = Evaluator(decoder, pairs, "logit_diff", "counterfactual", batch=2)
    size = round(0.02 * decoder.graph.edge_count)
    circuit = prune(decoder.graph, growth_order(decoder.graph, scores.double().numpy()), size)
    random = [prune(decoder.graph, random_order(decoder.graph, seed), size) for seed in range(2)]
    own, *others = map(evaluator.faithfulness, evaluator.metrics([circuit, *random]))
    assert own > 0.5
    assert np.max(others) < 0.2
