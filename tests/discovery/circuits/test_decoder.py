"""The graph's runs are the model's: whole, cut into nodes, and edge by edge."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import PROMPT, save_family

from discovery.circuits.attribution import edge_scores
from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.layer_names import LAYER_NAMES
from discovery.circuits.metric import measure
from discovery.circuits.pairs import Pair
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from interpretops.model.family import FAMILIES

OTHER = [*PROMPT[:4], 3, *PROMPT[5:]]


@pytest.fixture(scope="module", params=[*LAYER_NAMES, "GPTNeoXForCausalLM-sequential"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path
) -> GraphDecoder:
    """A tiny random model of each family; the tokenizer is any."""
    name, _, sequential = request.param.partition("-")
    changes = {"use_parallel_residual": False} if sequential else {}
    folder = save_family(name, tmp_path_factory.mktemp("family"), **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    return GraphDecoder(FrozenModel(folder, torch.float32))


@torch.no_grad()
def test_every_run_is_the_models_own(family: GraphDecoder) -> None:
    """Run as nodes, with an input for each node, and with all edges kept, the logits are Hugging Face's."""
    tokens = [PROMPT, OTHER]
    expected = family.network(input_ids=torch.tensor(tokens)).logits[:, -1]
    embedded = family.embed(tokens)
    stream, outputs = family.run(embedded, keep=True)
    assert outputs is not None
    torch.testing.assert_close(outputs.sum(0), stream, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(family.logits(stream), expected, atol=1e-4, rtol=1e-4)
    split = family.run_with_inputs(embedded)[0]
    torch.testing.assert_close(family.logits(split), expected, atol=1e-4, rtol=1e-4)
    whole = family.run_circuit(embedded, family.graph.allowed, outputs.flip(1))
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_no_edge_gives_the_run_of_the_reference(family: GraphDecoder) -> None:
    """With every edge ablated the logits are those of the corrupted prompt."""
    corrupted = family.embed([OTHER])
    stream, reference = family.run(corrupted, keep=True)
    assert reference is not None
    nothing = np.zeros_like(family.graph.allowed)
    logits = family.run_circuit(family.embed([PROMPT]), nothing, reference)
    torch.testing.assert_close(logits, family.logits(stream), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_ablating_all_edges_of_a_node_is_patching_it(family: GraphDecoder) -> None:
    """All edges but those that leave one head: the same as putting in its corrupted output."""
    node = family.graph.first_head(1) + 1
    clean = family.embed([PROMPT])
    reference = family.run(family.embed([OTHER]), keep=True)[1]
    assert reference is not None
    edges = family.graph.allowed.copy()
    edges[:, node] = False
    ablated = family.run_circuit(clean, edges, reference)
    patched = family.logits(family.run(clean, {node: reference[node]})[0])
    torch.testing.assert_close(ablated, patched, atol=1e-4, rtol=1e-4)
    whole = family.logits(family.run(clean)[0])
    assert float((whole - patched).abs().max()) > 1e-3


def test_scores_of_the_input_sum_to_the_contrast(family: GraphDecoder) -> None:
    """Completeness of integrated gradients, in every family: what leaves ``input`` is M(x) - M(x'), and no
    edge that the model does not have gets a score."""
    pair = Pair(tuple(PROMPT), tuple(OTHER), (3, 5), (9,))
    scores = edge_scores(family, [pair], "logit_diff", 64)[0]
    with torch.no_grad():
        clean, corrupted = (
            float(measure("logit_diff", family.logits(family.run(family.embed([side]))[0]), [pair]))
            for side in (PROMPT, OTHER)
        )
    assert abs(clean - corrupted) > 0.01
    assert float(scores[:, 0].sum()) == pytest.approx(clean - corrupted, rel=0.01)
    assert not scores[torch.from_numpy(~family.graph.allowed)].any()


def test_every_family_that_the_engine_serves_can_be_searched() -> None:
    """Whoever adds a family to the edit sites is told to say how its layers are laid out."""
    assert set(LAYER_NAMES) == set(FAMILIES)


def test_family_that_is_not_known_is_refused(tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the family, those that there are, and what to do instead."""
    monkeypatch.delitem(LAYER_NAMES, "LlamaForCausalLM")
    with pytest.raises(
        DiscoveryError, match=r"architecture = LlamaForCausalLM, but .* --from contrast"
    ) as error:
        GraphDecoder(tiny)
    assert len(str(error.value).splitlines()) == 1


@torch.no_grad()
def test_tokens_that_no_run_changes_are_left_out_exactly(family: GraphDecoder) -> None:
    """Behind a shared start every run gives, for the remaining tokens, what it gives of the whole prompts."""
    tokens, others = [PROMPT, [*PROMPT[:5], 2, 7, *PROMPT[7:]]], [OTHER, [*PROMPT[:5], 9, 1, *PROMPT[7:]]]
    embedded = family.embed(tokens)
    stream = family.run(embedded)[0]
    reference = family.run(family.embed(others), keep=True)[1]
    assert reference is not None
    edges = np.random.default_rng(0).random(family.graph.allowed.shape) < 0.5
    edges &= family.graph.allowed
    whole = family.run_circuit(embedded, edges, reference)
    for start in (1, 4):
        with family.behind([row[:start] for row in tokens]):
            rest = family.embed([row[start:] for row in tokens])
            torch.testing.assert_close(family.run(rest)[0], stream[:, start:], atol=1e-4, rtol=1e-4)
            own = family.run_with_inputs(rest)[0]
            torch.testing.assert_close(own, stream[:, start:], atol=1e-4, rtol=1e-4)
            part = family.run_circuit(rest, edges, reference[:, :, start:])
            torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(family.run(embedded)[0], stream)
