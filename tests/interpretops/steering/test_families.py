"""Every model family's edit sites, against edits computed by hand at other places of the same model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import CONFIGS, FIRES_AT, LAYERS, PROMPT, gate_plan, save_family
from torch import Tensor

from interpretops import HookedModel, SteeringSession
from interpretops.model.family import FAMILIES
from interpretops.plan import POINTS, Plan, Site, SiteEdits

TOLERANCE = 2e-5
"""Between float32 logits computed in two ways."""
PROMPT_LENGTH = 15
"""Shorter than PROMPT, so that its last tokens count as generated ones."""


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    """A tiny float32 model of one family, from its folder."""
    return HookedModel(save_family(request.param, tmp_path_factory.mktemp("family")), dtype="float32")


@pytest.fixture(scope="module")
def plan(model: HookedModel) -> Plan:
    return gate_plan(
        model.spec, model.run_with_cache(PROMPT, ["0.resid_post"])[Site(0, "resid_post")].numpy()
    )


def test_all_supported_architectures_are_tested() -> None:
    """No family can be served or read without standing here."""
    assert set(CONFIGS) == set(FAMILIES)


def test_points_are_where_their_names_say(model: HookedModel) -> None:
    """A layer adds to the stream what attention and MLP put out; attn_z holds all heads side by side."""
    sites = [Site(layer, point) for layer in range(LAYERS) for point in POINTS]
    kept = model.run_with_cache(PROMPT, sites)
    for layer in range(1, LAYERS):
        added = kept[Site(layer, "attn_out")] + kept[Site(layer, "mlp_out")]
        expected = kept[Site(layer - 1, "resid_post")] + added
        torch.testing.assert_close(kept[Site(layer, "resid_post")], expected, atol=1e-5, rtol=1e-5)
    spec = model.spec
    assert kept[Site(1, "attn_z")].shape == (len(PROMPT), spec.num_heads * spec.head_dim)


def test_hooks_agree_with_edits_made_by_hand(model: HookedModel, plan: Plan) -> None:
    """All points, head scales and gates at once: the logits of plain float64 formulas at other modules."""
    with SteeringSession(model, plan) as steer:
        ours = steer.logprobs(PROMPT, prompt_length=PROMPT_LENGTH)
    with edited_by_hand(model, plan):
        by_hand = model.logprobs(PROMPT)
    plain = model.logprobs(PROMPT)
    assert (ours - plain).abs().max() > 0.1
    assert (ours - by_hand).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "site", [*(Site(1, point) for point in POINTS), Site(LAYERS - 1, "resid_post")], ids=str
)
def test_edits_at_each_point_act_by_themselves(model: HookedModel, plan: Plan, site: Site) -> None:
    """Each point alone changes the logits, and as much as by hand."""
    part = Plan(plan.policy_id, plan.target_class, plan.model, {site: plan.edits[site]}, plan.gates)
    with SteeringSession(model, part) as steer:
        ours = steer.logprobs(PROMPT, prompt_length=PROMPT_LENGTH)
    with edited_by_hand(model, part):
        by_hand = model.logprobs(PROMPT)
    assert (ours - model.logprobs(PROMPT)).abs().max() > 1e-3
    assert (ours - by_hand).abs().max() < TOLERANCE


def test_cached_decoding_agrees_with_one_pass(model: HookedModel, plan: Plan) -> None:
    """Prompt, then token by token from the key-value cache: the same as all tokens at once."""
    with SteeringSession(model, plan) as steer:
        whole = steer.logprobs(PROMPT, prompt_length=PROMPT_LENGTH)
        receipt = steer.receipt
        cache, parts = None, []
        for start, end in [(0, PROMPT_LENGTH)] + [(t, t + 1) for t in range(PROMPT_LENGTH, len(PROMPT))]:
            out = model.network(torch.tensor([PROMPT[start:end]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits[0].log_softmax(-1))
        assert steer.receipt == receipt
    assert (torch.cat(parts) - whole).abs().max() < TOLERANCE


@contextmanager
def edited_by_hand(model: HookedModel, plan: Plan) -> Iterator[None]:
    """Edit a model token by token, by the formulas of `interpretops.plan`, at modules chosen here."""
    network = model.network
    layers = [module for name, module in network.named_modules() if name.endswith(tuple(_layer_names()))]
    neox, gemma = "GPTNeoX" in model.spec.architecture, "Gemma" in model.spec.architecture
    first_firing: list[int] = []
    handles = []

    def changed(site: Site, x: Tensor) -> Tensor:
        assert x.shape[0] == 1
        edits, rows = plan.edits[site], x[0].double().numpy()
        deltas = [token_delta(edits, row, open_gates(t)) for t, row in enumerate(rows)]
        return torch.from_numpy(np.stack(deltas))[None].to(x.dtype)

    def open_gates(position: int) -> list[bool]:
        latch = bool(first_firing) and position >= first_firing[0]
        return [True, latch, position < PROMPT_LENGTH, position >= PROMPT_LENGTH - 1]

    def read_gate(_module: Any, args: tuple[Any, ...]) -> None:
        gate = plan.gates[1]
        u = args[0][0].double().numpy() @ gate.read.T.astype(np.float64)
        first_firing[:] = np.flatnonzero((u > gate.cut).any(1))[:1].tolist()
        assert first_firing == [FIRES_AT]

    def adding(site: Site) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            edited = x + changed(site, x)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    def before(site: Site) -> Callable[..., Any]:
        return lambda _module, args: (args[0] + changed(site, args[0]), *args[1:])

    def through_projection(site: Site) -> Callable[..., Any]:
        # Linear: what a change of the input does to the output.
        return lambda module, args, output: output + changed(site, args[0]) @ module.weight.T

    def beside_projection(site: Site) -> Callable[..., Any]:
        upstream = Site(site.layer, "attn_z")

        def hook(_module: Any, args: tuple[Any, ...], output: Any) -> Any:
            z = args[0] + changed(upstream, args[0]) if upstream in plan.edits else args[0]
            return output + changed(site, z)

        return hook

    def at(layer: int, gemma_name: str, neox_name: str, other_name: str) -> Any:
        return layers[layer].get_submodule(gemma_name if gemma else neox_name if neox else other_name)

    for site in plan.edits:
        after = layers[site.layer + 1] if site.layer + 1 < LAYERS else _final_norm(network)
        if site.point == "resid_post":
            handles.append(after.register_forward_pre_hook(before(site)))
        elif site.point in ("attn_z", "attn_proj"):
            module = at(site.layer, "self_attn.o_proj", "attention.dense", "self_attn.o_proj")
            edit = through_projection if site.point == "attn_z" else beside_projection
            handles.append(module.register_forward_hook(edit(site)))
        elif site.point == "attn_out":
            module = at(site.layer, "post_attention_layernorm", "post_attention_dropout", "self_attn")
            handles.append(module.register_forward_hook(adding(site)))
        else:
            module = at(site.layer, "post_feedforward_layernorm", "post_mlp_dropout", "mlp.down_proj")
            handles.append(module.register_forward_hook(adding(site)))
    handles.append(layers[1].register_forward_pre_hook(read_gate))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_delta(edits: SiteEdits, x: np.ndarray, is_open: list[bool]) -> np.ndarray:
    """The table of `interpretops.plan`, kind by kind as policies mean them, not as the op computes them."""
    units = edits.units
    delta = np.zeros(units.write.shape[1])
    for k in range(len(units)):
        if not is_open[units.gate[k]] or np.linalg.norm(x) > units.max_norm[k]:
            continue
        read, write = units.read[k].astype(np.float64), units.write[k].astype(np.float64)
        u = read @ x + float(units.bias[k])
        active = u if u > units.threshold[k] else 0.0
        kind = k % 4
        if kind == 0:  # feature_scale by 1 + gain
            delta += (active * (1 + float(units.gain[k])) - active) * write
        elif kind == 1:  # feature_clamp
            delta += (min(max(active, float(units.low[k])), float(units.high[k])) - active) * write
        elif kind == 2:  # steering_vector
            delta += float(units.offset[k]) * write
        else:  # direction_ablation, or a row of an adapter
            delta += float(units.gain[k]) * (read @ x) * write
    if edits.head_scale is not None:
        for scale, gate in zip(edits.head_scale.delta, edits.head_scale.gate, strict=True):
            if is_open[gate]:
                delta += x * (1 + scale.astype(np.float64)) - x
    return delta


def _layer_names() -> list[str]:
    return [f"layers.{layer}" for layer in range(LAYERS)]


def _final_norm(network: Any) -> Any:
    body = network.base_model
    return body.final_layer_norm if hasattr(body, "final_layer_norm") else body.norm


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    """A model whose edit sites nobody has named is not guessed at."""
    from transformers import OPTConfig, OPTForCausalLM

    from interpretops.errors import ModelError

    config = OPTConfig(
        vocab_size=32,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    with pytest.raises(ModelError, match="OPTForCausalLM"):
        HookedModel(tmp_path / "opt")
