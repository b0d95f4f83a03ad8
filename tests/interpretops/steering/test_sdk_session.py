"""A steering session over a small model: what it lays out, what it refuses, what it leaves behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import FIRES_AT, PROMPT, gate_plan, save_family
from torch import Tensor

from interpretops import HookedModel, SteeringSession
from interpretops.errors import ModelError, PlanError, PolicyError
from interpretops.plan import Array, Plan, Site, SiteEdits

PASSES = 2e-5
"""Between float32 logits of the same tokens in differently shaped passes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return HookedModel(save_family("LlamaForCausalLM", tmp_path_factory.mktemp("model")), dtype="float32")


@pytest.fixture(scope="module")
def stream(model: HookedModel) -> Array:
    """The stream that the plans' gates read, on `PROMPT`."""
    kept: Array = model.run_with_cache(PROMPT, ["0.resid_post"])[Site(0, "resid_post")].numpy()
    return kept


@pytest.fixture(scope="module")
def plan(model: HookedModel, stream: Array) -> Plan:
    return gate_plan(model.spec, stream)


def behind(plan: Plan, gate: int) -> Plan:
    """The plan with all its edits behind one of its gates."""
    edits = {}
    for site, here in plan.edits.items():
        scale = here.head_scale
        edits[site] = SiteEdits(
            replace(here.units, gate=np.full_like(here.units.gate, gate)),
            None if scale is None else replace(scale, gate=np.full_like(scale.gate, gate)),
        )
    return replace(plan, edits=edits)


def test_leaving_restores_the_model_bit_by_bit(model: HookedModel, plan: Plan) -> None:
    """After a session the model's numbers are the same bits, and no module carries a hook."""
    before = model.logprobs(PROMPT)
    with SteeringSession(model, plan) as steer:
        assert not torch.equal(steer.logprobs(PROMPT), before)
    assert torch.equal(model.logprobs(PROMPT), before)
    for module in model.network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_an_error_inside_the_session_restores_the_model_too(model: HookedModel, plan: Plan) -> None:
    """The model is as before even if the session ends by an exception."""
    before = model.logprobs(PROMPT)
    with pytest.raises(ValueError, match="token_ids"), SteeringSession(model, plan):
        model.logprobs([])
    assert torch.equal(model.logprobs(PROMPT), before)


def test_everything_run_inside_is_steered(model: HookedModel, plan: Plan) -> None:
    """The model's own methods, called inside a session, give the session's numbers."""
    with SteeringSession(model, plan) as steer:
        assert torch.equal(model.logprobs(PROMPT), steer.logprobs(PROMPT))
        cached = model.run_with_cache(PROMPT, ["1.mlp_out"])[Site(1, "mlp_out")]
    assert not torch.equal(cached, model.run_with_cache(PROMPT, ["1.mlp_out"])[Site(1, "mlp_out")])


def test_a_module_called_by_itself_is_left_alone(model: HookedModel, plan: Plan) -> None:
    """Between passes no layout is left over that could edit what is not the session's to edit."""
    module, x = model.network.model.layers[1].mlp, torch.ones(1, len(PROMPT), model.spec.hidden_size)
    expected = module(x)
    with SteeringSession(model, plan) as steer:
        steer.logprobs(PROMPT)
        assert torch.equal(module(x), expected)


def test_gate_that_never_fires_leaves_every_bit(model: HookedModel, stream: Array) -> None:
    """A policy whose gate stays closed changes nothing at all, and its receipt says so."""
    closed = behind(gate_plan(model.spec, stream, fires=False), 1)
    with SteeringSession(model, closed) as steer:
        steered = steer.logprobs(PROMPT)
        assert (steer.receipt.edits_applied, steer.receipt.tokens_evaluated) == (0, len(PROMPT))
    assert torch.equal(steered, model.logprobs(PROMPT))


def test_tokens_before_a_latch_are_untouched(model: HookedModel, plan: Plan) -> None:
    """Until its gate fires a latched policy leaves every bit; from there on it acts."""
    with SteeringSession(model, behind(plan, 1)) as steer:
        steered = steer.logprobs(PROMPT)
    plain = model.logprobs(PROMPT)
    assert torch.equal(steered[:FIRES_AT], plain[:FIRES_AT])
    assert ((steered - plain).abs().amax(dim=1)[FIRES_AT:] > 1e-3).all()


@pytest.mark.parametrize("gate", [0, 1, 2, 3], ids=["always", "latched", "prefill", "decode"])
def test_decoding_from_the_cache_agrees_with_one_pass(model: HookedModel, plan: Plan, gate: int) -> None:
    """Prompt, then token by token: the same numbers and receipt as all at once, whichever gate governs."""
    for length in (5, FIRES_AT + 1, 17):
        with SteeringSession(model, behind(plan, gate)) as steer:
            whole = steer.logprobs(PROMPT, prompt_length=length)
            receipt = steer.receipt
            assert (decode(model, PROMPT, length) - whole).abs().max() < PASSES
            assert steer.receipt == receipt


def decode(model: HookedModel, tokens: list[int], prompt_length: int) -> Tensor:
    """Log-probabilities of a prompt's pass and of passes of one token each."""
    cache, parts = None, []
    steps = [(0, prompt_length), *((t, t + 1) for t in range(prompt_length, len(tokens)))]
    for start, end in steps:
        out = model.network(torch.tensor([tokens[start:end]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[0].log_softmax(-1))
    return torch.cat(parts)


def test_latch_does_not_outlive_its_request(model: HookedModel, plan: Plan) -> None:
    """A request after one whose gate fired begins with the gate closed."""
    quiet = PROMPT[:FIRES_AT]
    with SteeringSession(model, behind(plan, 1)) as steer:
        fresh = steer.logprobs(quiet)
        steer.logprobs(PROMPT)
        assert steer.receipt.gates_fired == len(PROMPT) - len(quiet)
        assert torch.equal(steer.logprobs(quiet), fresh)
    assert torch.equal(fresh, model.logprobs(quiet))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_are_steered_as_if_alone(model: HookedModel, plan: Plan, side: str) -> None:
    """In a padded batch each sequence gets its own numbers, and padding is neither read nor counted."""
    sequences = [PROMPT, PROMPT[3:], PROMPT[:7], PROMPT[10:15]]
    tokens, mask = pad(sequences, side)
    with SteeringSession(model, plan) as steer:
        logits = model.network(
            tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
        batch = steer.receipt
        alone = [steer.logprobs(sequence) for sequence in sequences]
        receipts = [(steer.logprobs(sequence), steer.receipt)[1] for sequence in sequences]
    for row, real, expected in zip(logits, mask.bool(), alone, strict=True):
        assert (row[real].log_softmax(-1) - expected).abs().max() < PASSES
    assert batch.tokens_evaluated == sum(map(len, sequences))
    assert batch.edits_applied == sum(receipt.edits_applied for receipt in receipts)
    assert batch.gates_fired == sum(receipt.gates_fired for receipt in receipts)


def pad(sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    tokens, mask = torch.zeros(2, len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        tokens[row, place], mask[row, place] = torch.tensor(sequence), 1
    return tokens, mask


def test_transformers_own_generation_is_steered_in_batches(model: HookedModel, plan: Plan) -> None:
    """`network.generate` over a left-padded batch gives each prompt the tokens that it gets by itself."""
    prompts = [PROMPT, PROMPT[:9], PROMPT[6:]]
    tokens, mask = pad(prompts, "left")
    with SteeringSession(model, plan) as steer:
        together = model.network.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
        alone = [steer.model.generate_tokens(prompt, 8) for prompt in prompts]
    assert together[:, tokens.shape[1] :].tolist() == alone
    assert alone != [model.generate_tokens(prompt, 8) for prompt in prompts]


def test_plan_may_come_from_a_file_or_a_policy(model: HookedModel, plan: Plan, tmp_path: Path) -> None:
    """A plan file and a policy file are taken as well as what they hold."""
    with SteeringSession(model, plan.save(tmp_path)) as steer:
        assert steer.revision == plan.revision
    policy = tmp_path / "halve.yaml"
    policy.write_text(
        'meta: {id: "halve", description: "Halve two heads", target_class: "test"}\n'
        'interventions: [{type: "head_scale", selector: {layer: 1, heads: [0, 3]}, scale: 0.5}]\n'
    )
    with SteeringSession(model, str(policy), artifacts=tmp_path) as steer:
        steer.logprobs(PROMPT)
        assert (steer.receipt.policy_id, steer.receipt.edits_applied) == ("halve", len(PROMPT))


def test_plan_of_another_model_is_refused(model: HookedModel, plan: Plan, tmp_path: Path) -> None:
    """A plan is bound to the weights it was compiled for; a missing file is one clear line."""
    other = replace(plan, model=replace(plan.model, fingerprint="0" * 64))
    with pytest.raises(PlanError, match="compiled for"), SteeringSession(model, other):
        pass
    with SteeringSession(model, plan):
        pass  # the refusal left nothing open
    with pytest.raises(PlanError, match=r"gone\.safetensors"):
        SteeringSession(model, tmp_path / "gone.safetensors")
    with pytest.raises(PolicyError, match=r"gone\.yaml"):
        SteeringSession(model, tmp_path / "gone.yaml")


def test_what_cannot_be_laid_out_is_refused(model: HookedModel, plan: Plan) -> None:
    """Caches filled elsewhere, masks with gaps, masks of other shapes: refused, never steered by guess."""
    cache = model.network(torch.tensor([PROMPT]), use_cache=True).past_key_values
    one = torch.tensor([[1]])
    with SteeringSession(model, plan):
        with pytest.raises(ModelError, match="holds 20 tokens"):
            model.network(one, past_key_values=cache)
        with pytest.raises(ModelError, match="gaps"):
            model.network(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 0, 1]]))
        with pytest.raises(ModelError, match=r"\[1, 1, 3, 3\]"):
            model.network(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 1, 3, 3))
        first = model.network(torch.tensor([PROMPT]), use_cache=True).past_key_values
        model.network(torch.tensor([PROMPT[:4]]), use_cache=True)
        with pytest.raises(ModelError, match="has seen 4 of 1"):
            model.network(one, past_key_values=first)


def test_one_session_at_a_time(model: HookedModel, plan: Plan) -> None:
    """Two sessions over one model would add up, so that the second is refused and the first unharmed."""
    with SteeringSession(model, plan) as steer:
        steered = steer.logprobs(PROMPT)
        with pytest.raises(ModelError, match="another session"), SteeringSession(model, plan):
            pass
        assert torch.equal(steer.logprobs(PROMPT), steered)


def test_closed_session_answers_nothing(model: HookedModel, plan: Plan) -> None:
    """Outside its block a session refuses to answer, as the answer would be unsteered."""
    session = SteeringSession(model, plan)
    with pytest.raises(ModelError, match="never entered"):
        _ = session.receipt
    for use in (lambda: session.logprobs(PROMPT), lambda: session.generate("x")):
        with pytest.raises(ModelError, match="not open"):
            use()
    with session as steer:
        steer.logprobs(PROMPT)
    assert session.receipt.tokens_evaluated == len(PROMPT)


@pytest.mark.parametrize("length", [0, len(PROMPT) + 1])
def test_prompt_length_must_lie_in_the_tokens(model: HookedModel, plan: Plan, length: int) -> None:
    """A prompt is at least one token and at most all of them."""
    with SteeringSession(model, plan) as steer, pytest.raises(ValueError, match="prompt_length"):
        steer.logprobs(PROMPT, prompt_length=length)


def test_many_head_scales_fit(model: HookedModel, plan: Plan) -> None:
    """The session's tables are made to measure, however many head scales a site has."""
    site = Site(1, "attn_z")
    edits = plan.edits[site]
    assert edits.head_scale is not None
    many: dict[str, Any] = {
        "delta": np.tile(edits.head_scale.delta, (9, 1)),
        "gate": np.tile(edits.head_scale.gate, 9),
    }
    big = replace(plan, edits={site: replace(edits, head_scale=replace(edits.head_scale, **many))})
    with SteeringSession(model, big) as steer:
        steer.logprobs(PROMPT)
        assert steer.receipt.edits_applied == len(PROMPT)
