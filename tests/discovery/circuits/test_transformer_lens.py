"""TransformerLens and SAELens as oracles: the same patches and gradients through other people's hooks."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import PROMPT, save_family
from torch import Tensor

from discovery.circuits.attribution import edge_scores, patching_effects
from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.features import FeatureSite, feature_effects
from discovery.circuits.metric import measure
from discovery.circuits.pairs import Pair
from discovery.frozen_model import FrozenModel
from interpretops.artifacts import Artifacts

PAIR = Pair(tuple(PROMPT[:8]), (*PROMPT[:3], 44, *PROMPT[4:8]), (5,), (9,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A tiny random Llama of three layers, four heads and two key-value heads."""
    folder = save_family("LlamaForCausalLM", tmp_path_factory.mktemp("lens"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    return folder


def bridge(folder: Path) -> Any:
    """TransformerLens' view of a local folder."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device="cpu")


def metric_of(logits: Tensor, pair: Pair) -> Tensor:
    return measure("logit_diff", logits[:, -1], [pair])[0]


def test_patching_a_head_or_mlp_is_transformer_lens(folder: Path) -> None:
    """Every head's and MLP's exact effect is what patching TransformerLens' activation gives."""
    decoder, lens = GraphDecoder(FrozenModel(folder, torch.float32)), bridge(folder)
    nodes = range(1, decoder.graph.logits)
    own = patching_effects(decoder, [PAIR], "logit_diff", list(nodes))[0]
    clean, corrupted = torch.tensor([PAIR.clean]), torch.tensor([PAIR.corrupted])
    with torch.no_grad():
        other = lens.run_with_cache(corrupted)[1]
        whole = metric_of(lens(clean), PAIR)
        expected = []
        for node in nodes:
            kind, layer, head = decoder.graph.place(node)
            name = f"blocks.{layer}." + ("attn.hook_z" if kind == "head" else "hook_mlp_out")

            def patch(value: Tensor, hook: Any, head: int | None = head, name: str = name) -> Tensor:
                if head is None:
                    return other[name]
                value = value.clone()
                value[:, :, head] = other[name][:, :, head]
                return value

            patched = lens.run_with_hooks(clean, fwd_hooks=[(name, patch)])
            expected.append(whole - metric_of(patched, PAIR))
    torch.testing.assert_close(own, torch.stack(expected), atol=1e-4, rtol=1e-3)
    assert float(own.abs().max()) > 0.05


def test_edge_scores_are_transformer_lens(folder: Path) -> None:
    """EAP-IG of every edge into an MLP, into a layer's heads together and into the logits, computed anew from
    TransformerLens' activations and gradients."""
    decoder, lens = GraphDecoder(FrozenModel(folder, torch.float32)), bridge(folder)
    graph, steps = decoder.graph, 5
    scores = edge_scores(decoder, [PAIR], "logit_diff", steps)[0]
    clean, corrupted = torch.tensor([PAIR.clean]), torch.tensor([PAIR.corrupted])
    with torch.no_grad():
        caches = [lens.run_with_cache(tokens)[1] for tokens in (clean, corrupted)]
    change = [caches[0]["hook_embed"] - caches[1]["hook_embed"]]
    for layer, block in enumerate(decoder.layers):
        attention: Any = block.self_attn
        weight = attention.o_proj.weight.view(-1, graph.heads, decoder.head_dim)
        z = caches[0][f"blocks.{layer}.attn.hook_z"] - caches[1][f"blocks.{layer}.attn.hook_z"]
        change += [torch.einsum("btf,df->btd", z[:, :, h], weight[:, h]) for h in range(graph.heads)]
        change.append(caches[0][f"blocks.{layer}.hook_mlp_out"] - caches[1][f"blocks.{layer}.hook_mlp_out"])
    points = [f"blocks.{layer}.ln{side}.hook_in" for layer in range(graph.layers) for side in (1, 2)]
    points.append("ln_final.hook_in")
    total = [torch.zeros_like(change[0]) for _ in points]
    for step in range(steps):
        leaves = [torch.zeros_like(change[0], requires_grad=True) for _ in points]
        embedded = caches[1]["hook_embed"] + (step + 0.5) / steps * change[0]

        def put(value: Tensor, hook: Any, new: Tensor) -> Tensor:
            return new

        def add(value: Tensor, hook: Any, leaf: Tensor) -> Tensor:
            return value + leaf

        hooks: list[Any] = [("hook_embed", partial(put, new=embedded))]
        hooks += [(name, partial(add, leaf=leaf)) for name, leaf in zip(points, leaves, strict=True)]
        value = metric_of(lens.run_with_hooks(clean, fwd_hooks=hooks), PAIR)
        found = torch.autograd.grad(value, leaves)
        total = [a + b / steps for a, b in zip(total, found, strict=True)]
    for layer in range(graph.layers):
        start, mlp = graph.first_head(layer), graph.mlp(layer)
        heads = torch.stack([(part * total[2 * layer]).sum() for part in change[:start]])
        torch.testing.assert_close(scores[start:mlp, :start].sum(0), heads, atol=1e-4, rtol=1e-3)
        own = torch.stack([(part * total[2 * layer + 1]).sum() for part in change[:mlp]])
        torch.testing.assert_close(scores[mlp, :mlp], own, atol=1e-4, rtol=1e-3)
    last = torch.stack([(part * total[-1]).sum() for part in change])
    torch.testing.assert_close(scores[graph.logits, :-1], last, atol=1e-4, rtol=1e-3)
    assert float(last.abs().max()) > 0.05


def test_feature_effects_are_saelens_in_transformer_lens(
    known: GraphDecoder, known_folder: Path, artifacts: Path, pairs: list[Pair]
) -> None:
    """SAELens encodes and decodes, TransformerLens patches: the same effect of every feature, and of all."""
    import sae_lens

    dictionary = artifacts / known_folder.name / "words"
    site = FeatureSite(known, Artifacts(artifacts, known.model.spec).named_dictionary("words"))
    pair, named = pairs[0], [[1], [8], [15], [16]]
    own = feature_effects(site, [pair], "logit_diff", named)[0]
    sae, lens = sae_lens.SAE.load_from_disk(str(dictionary), device="cpu"), bridge(known_folder)
    name = "blocks.0.hook_resid_post"
    with torch.no_grad():
        clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
        x, y = (lens.run_with_cache(tokens)[1][name] for tokens in (clean, corrupted))
        a, b = sae.encode(x), sae.encode(y)
        whole = metric_of(lens(clean), pair)
        expected = []
        for features in (*named, list(range(sae.cfg.d_sae))):
            mixed = a.clone()
            mixed[..., features] = b[..., features]
            edited = x + sae.decode(mixed) - sae.decode(a)
            patched = lens.run_with_hooks(clean, fwd_hooks=[(name, lambda value, hook, new=edited: new)])
            expected.append(whole - metric_of(patched, pair))
    torch.testing.assert_close(own[:-1], torch.stack(expected), atol=1e-4, rtol=1e-3)
    assert float(own[-2]) > 1
