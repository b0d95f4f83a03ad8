"""The circuit file: which components of a model carry a behaviour, how that was found and how well."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from interpretops.errors import InterpretOpsError
from interpretops.files.atomic_file import write_atomically
from interpretops.files.json_file import read_json_object
from interpretops.ids import id_pattern
from interpretops.policy.fields import Fraction, Index, StrictModel

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ComponentKind = Literal["input", "head", "mlp", "logits"]
"""Nodes that edges join."""
NodeKind = ComponentKind | Literal["feature", "error"]
FORMATS = (1, 2, 3)
"""Readable formats: 2 adds dictionaries and their features, 3 adds the id. Files are written in the last."""
Ablation = Literal["counterfactual", "mean"]


class CircuitError(InterpretOpsError):
    """A circuit file is unreadable or inconsistent; one line per fault."""

    code: ClassVar[str] = "invalid_circuit"
    status: ClassVar[int] = 400


class CircuitNode(StrictModel):
    """A component (the token embedding, a head, an MLP, the logits), or a feature of the residual stream."""

    id: Annotated[str, Field(pattern=r"^(input|logits|a\d+\.h\d+|m\d+|f\d+\.\d+|e\d+)$")]
    """``input``, ``a<layer>.h<head>``, ``m<layer>``, ``logits``, ``f<layer>.<feature>`` or ``e<layer>``."""
    kind: NodeKind
    """``error`` is the reconstruction error: the part of the stream that the features do not explain."""
    layer: Index | None = None
    head: Index | None = None
    feature: Index | None = None
    dictionary: str | None = None
    """The dictionary's id, for a feature or an error."""
    score: Finite
    """Attribution: the summed scores of all outgoing edges, including those outside the circuit.

    For ``logits``, which has no outgoing edges, the sum is over incoming edges. For a feature it is the
    integrated gradient along the feature's own change."""
    ccs: Finite | None = None
    """Causal Contribution Score: the share of the metric's contrast that is lost when only this node is
    replaced by its counterfactual value; None for ``input`` and ``logits``."""

    @model_validator(mode="after")
    def _named_by_kind(self) -> Self:
        names = {"input": "input", "logits": "logits"}
        names |= {"head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}
        names |= {"feature": f"f{self.layer}.{self.feature}", "error": f"e{self.layer}"}
        if self.id != names[self.kind]:
            raise ValueError(f"has id {self.id!r}, but kind, layer and head make {names[self.kind]!r}")
        if (self.dictionary is None) == (self.kind in ("feature", "error")):
            raise ValueError(f"has dictionary {self.dictionary!r}; only a feature or an error names one")
        return self


class CircuitEdge(StrictModel):
    """One node's contribution to the residual stream, read by another node."""

    source: str
    target: str
    score: Finite


class Method(StrictModel):
    """How the circuit was found."""

    attribution: Literal["eap-ig"] = "eap-ig"
    """Edge attribution patching with integrated gradients (Hanna et al. 2024, arXiv:2403.17806)."""
    steps: Count
    """Interpolation steps m between the corrupted and the clean embeddings."""
    pruning: Literal["greedy"] = "greedy"
    """Edges are added by decreasing absolute score, backwards from the logits; dead ends are pruned."""
    wanted_edges: Count
    """The largest number of edges allowed."""
    edges_of_model: Count
    nodes_of_model: Count


class DataFile(StrictModel):
    """A file of contrast pairs."""

    name: str
    sha256: Sha256
    discovery_pairs: Count
    evaluation_pairs: Count
    """Held-out pairs, not used for attribution: faithfulness and contributions are measured on them."""
    skipped_pairs: Index = 0
    """Pairs skipped because their prompts or answers do not align."""


class RandomCircuits(StrictModel):
    """The same measures for connected random circuits of the same sizes."""

    count: Count
    faithfulness_mean: Finite
    faithfulness_best: Finite
    cpr_mean: Finite
    cpr_best: Finite
    cmd_mean: Finite
    cmd_best: Finite
    share_at_least_as_close: Fraction
    """Share of the random circuits whose faithfulness is at least as close to 1 as the circuit's."""


class Faithfulness(StrictModel):
    """How much of the model's behaviour the circuit alone preserves, under one kind of ablation."""

    ablation: Ablation
    full_metric: Finite
    """Mean metric of the whole model on the clean prompts."""
    empty_metric: Finite
    """The same with every edge ablated."""
    circuit_metric: Finite
    faithfulness: Finite
    """(circuit - empty) / (full - empty)."""
    sizes: tuple[Fraction, ...]
    """Shares of the model's edges at which the curve was measured."""
    edges: tuple[Index, ...]
    """Edge counts of the circuits of these sizes, after pruning dead ends."""
    curve: tuple[Finite, ...]
    """Faithfulness at `sizes`."""
    cpr: Finite
    """Integrated circuit performance ratio: area under the curve, higher is better (arXiv:2504.13151)."""
    cmd: Finite
    """Integrated circuit-model distance: area of \\|1 - curve\\|; lower is better."""
    random: RandomCircuits | None = None

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if not len(self.sizes) == len(self.edges) == len(self.curve):
            raise ValueError("needs as many 'edges' and points of 'curve' as 'sizes'")
        return self


class Stability(StrictModel):
    """Circuit Stability: how similar the circuits of resampled pairs are (mean pairwise Jaccard)."""

    resamples_per_seed: Count
    circuits: Count
    edge_jaccard: Fraction
    edge_interval: tuple[Fraction, Fraction] | None = None
    """95 % bootstrap interval over the circuits; None in files written before it was measured."""
    edge_chance: Fraction
    """Expected for uniformly random edge sets of the same sizes."""
    edge_random: Fraction | None = None
    """Measured between connected random circuits of the same size."""
    node_jaccard: Fraction
    node_chance: Fraction
    paraphrases: Index = 0
    """Wordings that the pairs file distinguishes."""
    paraphrase_edge_jaccard: Fraction | None = None
    """Between circuits that were each found on the pairs of a single wording."""
    paraphrase_node_jaccard: Fraction | None = None


class CircuitDictionary(StrictModel):
    """A dictionary of the residual stream, and how much of the contrast its features carry.

    Shares are of the contrast M(clean) - M(corrupted), as Causal Contribution Scores are."""

    id: str
    layer: Index
    width: Count
    weights_sha256: Sha256
    active: Index
    """Features whose activation differs between the two sides of at least one searched pair."""
    score_features: Finite
    """Sum of the attribution scores of all features."""
    score_error: Finite
    """Attribution score of the reconstruction error, which is a separate node."""
    ccs_all: Finite
    """Share lost when all features take their counterfactual values together."""
    ccs_named: Finite
    """Share lost when the features among the circuit's nodes take theirs together."""
    random_sets: Index
    """Random sets of equally many active features: the baseline for `ccs_named`."""
    ccs_random_mean: Finite
    ccs_random_best: Finite
    jaccard: Fraction
    """Mean pairwise Jaccard of the features found on resampled pairs."""
    chance: Fraction
    """The value expected for uniformly random sets of active features."""


class Circuit(StrictModel):
    """A circuit with everything needed to judge and reproduce it."""

    format: Literal[1, 2, 3] = 3
    id: Annotated[str, Field(pattern=id_pattern("cx"))] | None = None
    """``cx_`` and a ULID; None in files written before circuits had ids."""
    target_class: str
    model: str
    fingerprint: Sha256
    metric: Literal["logit_diff", "log_odds", "prob_diff"]
    method: Method
    data: Annotated[tuple[DataFile, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    nodes: Annotated[tuple[CircuitNode, ...], Field(min_length=2)]
    edges: Annotated[tuple[CircuitEdge, ...], Field(min_length=1)]
    """Edges between components; features are scored, but have no edges."""
    dictionaries: tuple[CircuitDictionary, ...] = ()
    faithfulness: tuple[Faithfulness, ...]
    stability: Stability
    run: dict[str, Any]
    """The run record: commit, settings, versions, machine."""

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        twice = [name for name, n in Counter(node.id for node in self.nodes).items() if n > 1]
        twice += [
            f"{s}->{t}" for (s, t), n in Counter((e.source, e.target) for e in self.edges).items() if n > 1
        ]
        if twice:
            raise ValueError(f"names {twice[0]} twice")
        known = {node.id for node in self.nodes if node.dictionary is None}
        for edge in self.edges:
            for end in (edge.source, edge.target):
                if end not in known:
                    raise ValueError(f"has an edge {edge.source}->{edge.target}, but no node {end!r}")
        layers = {found.id: found.layer for found in self.dictionaries}
        for node in self.nodes:
            if node.dictionary is not None and layers.get(node.dictionary) != node.layer:
                raise ValueError(f"has a node {node.id}, but no dictionary {node.dictionary!r} at that layer")
        if self.format == 1 and self.dictionaries:
            raise ValueError("names dictionaries, which format 1 does not have")
        if self.format < 3 and self.id is not None:
            raise ValueError(f"has an id, which format {self.format} does not have")
        return self

    def components(self) -> tuple[CircuitNode, ...]:
        """The heads and MLPs, strongest contribution first."""
        return _strongest(node for node in self.nodes if node.kind in ("head", "mlp"))

    def features(self, dictionary: str | None = None) -> tuple[CircuitNode, ...]:
        """The features, of one dictionary or of all, strongest contribution first.

        A positive contribution supports the behaviour, a negative one works against it.
        """
        return _strongest(
            node for node in self.nodes if node.kind == "feature" and dictionary in (None, node.dictionary)
        )

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False)
        write_atomically(path, (text + "\n").encode())


def _strongest(nodes: Iterable[CircuitNode]) -> tuple[CircuitNode, ...]:
    return tuple(sorted(nodes, key=lambda node: -abs(node.ccs or 0.0)))


def load_circuit(path: Path) -> Circuit:
    """Read a circuit file of at most 16 MiB; raises `CircuitError`."""
    document = read_json_object(path, CircuitError)
    if (found := document.get("format", FORMATS[-1])) not in FORMATS:
        raise CircuitError(
            f"{path}: format = {found!r}, but this version reads {FORMATS[0]} to {FORMATS[-1]}; "
            "update interpretops, or run the search again"
        )
    try:
        return Circuit.model_validate_json(json.dumps(document))
    except ValidationError as error:
        lines = [
            f"{path}: {'.'.join(map(str, fault['loc'])) or 'circuit'}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise CircuitError("\n".join(lines[:8])) from error
