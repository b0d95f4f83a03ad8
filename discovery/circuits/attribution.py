"""The importance of edges and nodes: EAP-IG for all of them at once, exact patching for single nodes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.metric import Metric, measure
from discovery.circuits.pairs import Pair, contrast_start


def edge_scores(decoder: GraphDecoder, pairs: Sequence[Pair], metric: Metric, steps: int) -> Tensor:
    """EAP-IG scores [B, N, N] (target, source) of every edge, separately for each pair, on the CPU.

    Edge attribution patching with integrated gradients (Hanna, Pezzelle, Belinkov 2024, "Have Faith in
    Faithfulness", arXiv:2403.17806), with the sign that a positive edge supports the metric M:

        score(u -> v) = (o_u(x) - o_u(x')) . 1/m sum_k dM(e' + a_k (e - e')) / d input_v

    x and x' are the clean and the corrupted prompt, e and e' their embeddings, o_u the contribution of node u
    to the residual stream, m the steps; summed over positions. The paper uses a_k = k/m; we use the midpoints
    a_k = (k - 1/2)/m, which approximate the same integral more closely. The scores of the edges that leave
    ``input`` sum to M(x) - M(x') up to that error (completeness of integrated gradients).

    Before the first differing token all scores are zero, so those tokens are run only once.
    """
    start = contrast_start(pairs)
    with decoder.behind([pair.clean[:start] for pair in pairs]):
        clean = decoder.embed([pair.clean[start:] for pair in pairs])
        corrupted = decoder.embed([pair.corrupted[start:] for pair in pairs])
        with torch.no_grad():
            outputs, outputs_corrupted = (decoder.run(e, keep=True)[1] for e in (clean, corrupted))
            assert outputs is not None
            assert outputs_corrupted is not None
            change = outputs - outputs_corrupted
            del outputs, outputs_corrupted
        gradients: list[Tensor] = []
        for step in range(steps):
            point = (corrupted + (step + 0.5) / steps * (clean - corrupted)).requires_grad_()
            stream, inputs = decoder.run_with_inputs(point)
            value = measure(metric, decoder.logits(stream), pairs).sum()
            found = torch.autograd.grad(value, inputs)
            gradients = (
                [a + b / steps for a, b in zip(gradients, found, strict=True)]
                if gradients
                else [g / steps for g in found]
            )
    return _by_edge(decoder, change, gradients)


def _by_edge(decoder: GraphDecoder, change: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    graph = decoder.graph
    scores = torch.zeros(change.shape[1], graph.size, graph.size)
    for layer in range(graph.layers):
        start, mlp = graph.first_head(layer), graph.mlp(layer)
        heads, own = gradients[2 * layer], gradients[2 * layer + 1]
        scores[:, start:mlp, :start] = torch.einsum("ubtd,vbtd->bvu", change[:start], heads).cpu()
        reads = graph.mlp_reads(layer)
        scores[:, mlp, :reads] = torch.einsum("ubtd,btd->bu", change[:reads], own).cpu()
    scores[:, graph.logits, : graph.logits] = torch.einsum("ubtd,btd->bu", change, gradients[-1]).cpu()
    return scores


def node_scores(edges: Tensor) -> Tensor:
    """EAP-IG scores [..., N] of nodes: the sum over outgoing edges, or over incoming edges for the logits."""
    scores = edges.sum(-2)
    scores[..., -1] = edges[..., -1, :].sum(-1)
    return scores


@torch.no_grad()
def patching_effects(
    decoder: GraphDecoder, pairs: Sequence[Pair], metric: Metric, nodes: Sequence[int]
) -> Tensor:
    """Exact effects [B, len(nodes)]: M(x) minus M(x with the node's output taken from x').

    Activation patching with one forward pass per node; EAP-IG approximates it.
    """
    start = contrast_start(pairs)
    with decoder.behind([pair.clean[:start] for pair in pairs]):
        clean = decoder.embed([pair.clean[start:] for pair in pairs])
        corrupted = decoder.embed([pair.corrupted[start:] for pair in pairs])
        outputs = decoder.run(corrupted, keep=True)[1]
        assert outputs is not None
        whole = measure(metric, decoder.logits(decoder.run(clean)[0]), pairs)
        effects = [
            whole - measure(metric, decoder.logits(decoder.run(clean, {node: outputs[node]})[0]), pairs)
            for node in nodes
        ]
    return torch.stack(effects, dim=1).cpu()
