"""Runs a Hugging Face decoder as a graph: node outputs, separate node inputs, edge-by-edge ablation.

Shape letters: B sequences, T tokens, D width, H heads, N nodes, V vocabulary. There is no padding:
all sequences in a batch have the same length.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from discovery.circuits.attention import Attention
from discovery.circuits.graph import Edges, Graph
from discovery.circuits.layer_names import LAYER_NAMES
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from interpretops.model.family import family_of
from interpretops.plan import Site
from interpretops.steering.hook_points import site_module


class GraphDecoder:
    """The computation of a frozen model, split at every node's input and output.

    A node's output is its contribution to the residual stream: the embedding, ``z_h W_O[h]`` of a head, an
    MLP's output. A node's input is a sum of outputs. Raises `DiscoveryError` for an unknown family.

    A bias of the output projection is divided equally among the heads. If a norm follows attention (Gemma),
    the heads' sum is scaled by one factor per token, and each head's output is ``z_h W_O[h]`` times that
    factor.
    """

    def __init__(self, model: FrozenModel) -> None:
        spec = model.spec
        if spec.architecture not in LAYER_NAMES:
            raise DiscoveryError(
                f"{spec.name}: architecture = {spec.architecture}, but circuits are searched in "
                f"{', '.join(LAYER_NAMES)}; without a circuit, use mechctl propose --from contrast"
            )
        self.model, self.network, self.layers = model, model.network, model.layers
        self.names = LAYER_NAMES[spec.architecture]
        config = self.network.config
        self.graph = Graph(
            spec.num_layers, spec.num_heads, bool(getattr(config, "use_parallel_residual", False))
        )
        family = family_of(spec.architecture)
        sites = range(spec.num_layers)
        self.projections = [site_module(self.layers, family, Site(layer, "attn_z")) for layer in sites]
        self.head_dim = spec.head_dim
        self.attention = Attention(model, self.projections, self.names)
        self.logit_cap: float | None = getattr(config, "final_logit_softcapping", None)

    def embed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings [B, T, D] of sequences of equal length."""
        ids = torch.tensor([list(row) for row in tokens], device=self.model.device)
        embedded: Tensor = self.network.get_input_embeddings()(ids)
        return embedded

    @contextmanager
    def behind(self, tokens: Sequence[Sequence[int]]) -> Iterator[None]:
        """Within the block, every sequence continues the prefix of ``tokens`` at its batch index.

        Exact if no run changes the prefix, and several times cheaper, because no node is computed there
        again. Without tokens, this has no effect.
        """
        if not tokens or not tokens[0]:
            yield
            return
        with torch.no_grad(), self.attention.recording() as past:
            self.run(self.embed(tokens))
        with self.attention.behind(past):
            yield

    def logits(self, stream: Tensor) -> Tensor:
        """Logits [B, V] at the last position of the final residual stream [B, T, D]."""
        norm = self.network.base_model.get_submodule(self.names.final_norm)
        found: Tensor = self.network.get_output_embeddings()(norm(stream[:, -1]))
        return found if self.logit_cap is None else self.logit_cap * torch.tanh(found / self.logit_cap)

    def head_outputs(self, layer: int, streams: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """The heads' contributions. With ``streams`` [1, B, T, D], all H heads read it; output [H, B, T, D].

        With K ``heads``, ``streams`` is [K, B, T, D], one input per head; the output has the same shape.
        If `heads_together`, all heads must be requested.
        """
        normed = self.layers[layer].get_submodule("input_layernorm")(streams)
        weight = self._weight(layer)
        if heads is None:
            z = self.attention.every_head(layer, normed[0])
        else:
            z = self.attention.own_inputs(layer, normed, heads)
            weight = weight[list(heads)]
        added = torch.einsum("bthf,hfd->hbtd", z, weight)
        if self.projections[layer].bias is not None:
            added = added + self.projections[layer].get_parameter("bias") / self.graph.heads
        if self.names.after_attention is None:
            return added
        assert len(added) == self.graph.heads, "the norm after attention is of all heads together"
        return added * _norm_factor(
            self.layers[layer].get_submodule(self.names.after_attention), added.sum(0)
        )

    @property
    def heads_together(self) -> bool:
        """Whether a head's contribution depends on the other heads of its layer."""
        return self.names.after_attention is not None

    def mlp_output(self, layer: int, stream: Tensor) -> Tensor:
        """An MLP's contribution to the stream, [B, T, D]."""
        block = self.layers[layer]
        found: Tensor = block.get_submodule("mlp")(block.get_submodule(self.names.before_mlp)(stream))
        return found if self.names.after_mlp is None else block.get_submodule(self.names.after_mlp)(found)

    def run(
        self,
        embedded: Tensor,
        patches: Mapping[int, Tensor] | None = None,
        *,
        keep: bool = False,
        layers: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The final stream [B, T, D], and with ``keep`` all nodes' outputs [N-1, B, T, D].

        patches: outputs [B, T, D] that replace the nodes' own
        layers: run only these layers; ``embedded`` is then the stream that enters the first of them
        """
        patches = patches or {}
        stream = patches.get(0, embedded)
        outputs = [stream[None]]
        for layer in range(self.graph.layers) if layers is None else layers:
            start, mlp = self.graph.first_head(layer), self.graph.mlp(layer)
            heads = self.head_outputs(layer, stream[None])
            patched = [index for index in range(start, mlp) if index in patches]
            if patched:
                heads = heads.clone()
                for index in patched:
                    heads[index - start] = patches[index]
            between = stream + heads.sum(0)
            read = stream if self.graph.parallel else between
            added = patches[mlp] if mlp in patches else self.mlp_output(layer, read)
            stream = between + added
            if keep:
                outputs += [heads, added[None]]
        return stream, torch.cat(outputs) if keep else None

    def run_with_inputs(self, embedded: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The final stream, and a separate copy of every node's input, for gradients: per layer [H, B, T, D]
        for the heads and [B, T, D] for the MLP, then [B, T, D] for the logits (the returned stream)."""
        stream, inputs = embedded, []
        every = range(self.graph.heads)
        for layer in range(self.graph.layers):
            read = stream.expand(self.graph.heads, *stream.shape).clone()
            between = stream + self.head_outputs(layer, read, every).sum(0)
            read_mlp = (stream if self.graph.parallel else between).clone()
            stream = between + self.mlp_output(layer, read_mlp)
            inputs += [read, read_mlp]
        last = stream.clone()
        return last, [*inputs, last]

    @torch.no_grad()
    def run_circuit(self, embedded: Tensor, edges: Edges, reference: Tensor) -> Tensor:
        """Logits [B, V] if only ``edges`` carry their sources' outputs and all other edges the reference.

        reference: outputs [N-1, B or 1, T, D] of all nodes, carried by ablated edges

        Exact: each node reads ``sum_u reference_u + sum_(u in edges) (output_u - reference_u)``. Nodes
        without an outgoing edge in the circuit are not computed.
        """
        graph = self.graph
        used: list[bool] = np.logical_or.reduce(edges, axis=0).tolist()
        weights = torch.from_numpy(np.ascontiguousarray(edges)).to(embedded)
        surplus = embedded.new_zeros(graph.size - 1, *embedded.shape)
        surplus[0] = embedded - reference[0]
        ground = reference[0].expand_as(embedded).clone()

        def read(nodes: Sequence[int], first: int, last: int) -> Tensor:
            """The sum of output minus reference that nodes receive from sources first..last-1."""
            sources = first + np.flatnonzero(edges[list(nodes), first:last].any(0))
            if not len(sources):
                return embedded.new_zeros(len(nodes), *embedded.shape)
            part = surplus[first:last] if 2 * len(sources) > last - first else surplus[sources]
            wanted = (
                weights[list(nodes), first:last] if len(part) == last - first else weights[nodes][:, sources]
            )
            return (wanted @ part.flatten(1)).view(len(nodes), *embedded.shape)

        for layer in range(graph.layers):
            start, mlp = graph.first_head(layer), graph.mlp(layer)
            heads = [head for head in range(graph.heads) if used[start + head]]
            if heads and self.heads_together:
                heads = list(range(graph.heads))
            nodes = [start + head for head in heads] + [mlp] * used[mlp]
            if nodes:  # in one operation: each source is read from memory once per layer
                mixed = read(nodes, 0, start)
            if heads:
                own = self.head_outputs(layer, ground + mixed[: len(heads)], heads)
                surplus[nodes[: len(heads)]] = own - reference[nodes[: len(heads)]]
            below = ground.clone() if graph.parallel else ground
            ground += reference[start:mlp].sum(0)
            if used[mlp]:
                stream = below + mixed[-1] + read([mlp], start, graph.mlp_reads(layer))[0]
                surplus[mlp] = self.mlp_output(layer, stream) - reference[mlp]
            ground += reference[mlp]
        return self.logits(ground + read([graph.logits], 0, graph.logits)[0])

    def _weight(self, layer: int) -> Tensor:
        """The output projection by head [H, head_dim, D]."""
        weight: Tensor = self.projections[layer].get_parameter("weight")
        return weight.view(weight.shape[0], self.graph.heads, self.head_dim).permute(1, 2, 0)


def _norm_factor(norm: nn.Module, total: Tensor) -> Tensor:
    """The elementwise factor that Gemma's root-mean-square norm applies to ``total`` [..., D]."""
    eps: float = norm.eps  # type: ignore[assignment]  # a float of transformers' module
    factor: Tensor = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps) * (
        1 + norm.get_parameter("weight")
    )
    return factor
