"""Ways of generating inside a session: what is followed exactly, and what is refused in one line."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import PROMPT, gate_plan, save_family
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from interpretops import HookedModel, SteeringSession
from interpretops.errors import ModelError
from interpretops.plan import Array, Gate, Plan, ProbePart, Site, SiteEdits

LENGTH = 9
"""Tokens of the prompt, of `PROMPT`."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return HookedModel(save_family("LlamaForCausalLM", tmp_path_factory.mktemp("model")), dtype="float32")


@pytest.fixture(scope="module")
def stream(model: HookedModel) -> Array:
    kept: Array = model.run_with_cache(PROMPT, ["0.resid_post"])[Site(0, "resid_post")].numpy()
    return kept


@pytest.fixture(scope="module")
def plan(model: HookedModel, stream: Array) -> Plan:
    return gate_plan(model.spec, stream)


def gates(model: HookedModel, stream: Array) -> dict[str, Gate]:
    """One of each kind that depends on where the prompt ends, and a latch; all of them open."""
    plan, site = gate_plan(model.spec, stream), Site(0, "resid_post")
    last = np.linalg.pinv(stream[:LENGTH].astype(np.float64))[:, -1].astype(np.float32)[None]
    zero, half = np.zeros(1, np.float32), np.full(1, 0.5, np.float32)
    probe = ProbePart(site, 8 * last, last, zero)
    return {
        "prefill": plan.gates[2],
        "decode": plan.gates[3],
        "latched": Gate(site, np.zeros((1, 64), np.float32), half + 1, half, latched=True),
        "prompt_end": Gate(site, last, zero, half, scope="prompt_end", latched=True),
        "prompt": Gate(
            site, plan.gates[0].read, zero[:0], half, scope="prompt", latched=True, probe=(probe,)
        ),
        "answer": Gate(
            site,
            plan.gates[0].read,
            zero[:0],
            half - 100,
            scope="answer",
            latched=True,
            probe=(probe,),
            window=4,
        ),
    }


def behind(plan: Plan, gate: Gate) -> Plan:
    """The plan with every edit behind one gate."""
    edits = {}
    for site, here in plan.edits.items():
        scale = here.head_scale
        edits[site] = SiteEdits(
            replace(here.units, gate=np.ones_like(here.units.gate)),
            None if scale is None else replace(scale, gate=np.ones_like(scale.gate)),
        )
    return replace(plan, edits=edits, gates=(plan.gates[0], gate))


@pytest.mark.parametrize("kind", ["prefill", "decode", "latched", "prompt_end", "prompt", "answer"])
def test_generating_without_a_cache_gives_what_the_cache_gives(
    model: HookedModel, stream: Array, plan: Plan, kind: str
) -> None:
    """`generate(use_cache=False)` runs the prompt at each step anew; phases, ends and latches stay."""
    steered = behind(plan, gates(model, stream)[kind])
    prompts, mask = torch.tensor([PROMPT[:LENGTH], [0, 0, *PROMPT[2:LENGTH]]]), torch.ones(2, LENGTH).long()
    mask[1, :2] = 0
    found, receipts = {}, {}
    with SteeringSession(model, steered) as session:
        for cached in (True, False):
            found[cached] = model.network.generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=False,
                use_cache=cached,
                output_logits=True,
                return_dict_in_generate=True,
            )
            receipts[cached] = session.receipt
        assert receipts[True] == receipts[False]
    for one, other in zip(found[True].logits, found[False].logits, strict=True):
        assert (one - other).abs().max() < 1e-4
    plain = model.network.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert receipts[True].edits_applied > 0
    assert not torch.allclose(found[True].logits[0], plain.logits[0], atol=1e-2) or kind in (
        "decode",
        "answer",
    )
    assert found[True].sequences.tolist() != plain.sequences.tolist()


def test_sequences_of_a_batch_keep_their_own_readings(model: HookedModel, stream: Array, plan: Plan) -> None:
    """A prompt that opens the gate beside one that does not: each is read as it is alone."""
    prompts, counts = [PROMPT[:LENGTH], [PROMPT[0]] * LENGTH], []
    with SteeringSession(model, behind(plan, gates(model, stream)["prompt"])) as session:
        for batch in ([prompts[0]], [prompts[1]], prompts):
            model.network.generate(torch.tensor(batch), max_new_tokens=4, min_new_tokens=4, do_sample=False)
            counts.append(session.receipt.gates_fired)
    assert counts == [4, 0, 4]


@pytest.mark.parametrize("kind", ["prefill", "decode", "prompt_end", "prompt", "answer"])
@pytest.mark.parametrize("use_cache", [False, None])
def test_loop_without_a_cache_is_refused_where_the_prompt_matters(
    model: HookedModel, stream: Array, plan: Plan, kind: str, use_cache: bool | None
) -> None:
    """A hand-written loop that gives the whole text anew makes all of it a prompt: the second is refused."""
    ids = torch.tensor([PROMPT[:LENGTH]])
    with SteeringSession(model, behind(plan, gates(model, stream)[kind])) as session:
        model.network(ids, use_cache=use_cache)
        with pytest.raises(ModelError, match=r"its prompt from its answer.*past_key_values.*prompt_length"):
            model.network(torch.tensor([PROMPT[: LENGTH + 1]]), use_cache=use_cache)
        for length in (LENGTH, LENGTH + 1, LENGTH + 2):  # scoring says what it reads
            session.logprobs(PROMPT[:length])
            model.run_with_cache(PROMPT[:length], ["1.mlp_out"])
            model.logprobs(PROMPT[:length])
        model.network(ids)
        model.network(torch.tensor([PROMPT[1 : LENGTH + 2]]))  # another text


def test_loop_without_a_cache_is_exact_where_the_prompt_does_not_matter(
    model: HookedModel, stream: Array, plan: Plan
) -> None:
    """Gates read at each token, latched or not, come out the same from every pass over the whole text."""
    with SteeringSession(model, behind(plan, gates(model, stream)["latched"])) as session:
        whole = session.logprobs(PROMPT[: LENGTH + 2])
        for length in (LENGTH, LENGTH + 1, LENGTH + 2):
            logits = model.network(torch.tensor([PROMPT[:length]]), use_cache=False).logits[0]
            assert (logits.log_softmax(-1) - whole[:length]).abs().max() < 2e-5


REFUSED: dict[GenerationMode, dict[str, Any]] = {
    GenerationMode.BEAM_SEARCH: {"num_beams": 2},
    GenerationMode.BEAM_SAMPLE: {"num_beams": 2, "do_sample": True},
    GenerationMode.GROUP_BEAM_SEARCH: {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0},
    GenerationMode.CONSTRAINED_BEAM_SEARCH: {"force_words_ids": [[3]]},
    GenerationMode.CONTRASTIVE_SEARCH: {"penalty_alpha": 0.6, "top_k": 4},
    GenerationMode.DOLA_GENERATION: {"dola_layers": "low"},
    GenerationMode.ASSISTED_GENERATION: {"prompt_lookup_num_tokens": 3},
}
FOLLOWED = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_mode_of_transformers_is_followed_or_refused(
    model: HookedModel, plan: Plan, mode: GenerationMode
) -> None:
    """Greedy search and sampling run; each other mode that transformers has is refused by its field."""
    ids = torch.tensor([PROMPT])
    with SteeringSession(model, plan):
        if mode in FOLLOWED:
            model.network.generate(ids, max_new_tokens=2, do_sample=mode is GenerationMode.SAMPLE)
            return
        field = next(iter(REFUSED[mode]))
        with pytest.raises(ModelError, match=rf"generate\({field}=.*leave {field} out"):
            model.network.generate(ids, max_new_tokens=2, **REFUSED[mode])
        config = GenerationConfig(max_new_tokens=2, **REFUSED[mode])
        with pytest.raises(ModelError, match=rf"generate\({field}="):
            model.network.generate(ids, config)


@pytest.mark.parametrize(
    "given",
    [
        {"assistant_early_exit": 1},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 4},
        {"custom_generate": lambda *_, **__: None},
        {"use_mtp": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_runs_other_passes_in_between_is_refused(
    model: HookedModel, plan: Plan, given: dict[str, Any]
) -> None:
    """Other texts between a request's passes, prompts in pieces, and loops of somebody else's."""
    with SteeringSession(model, plan), pytest.raises(ModelError, match=rf"generate\({next(iter(given))}="):
        model.network.generate(torch.tensor([PROMPT]), max_new_tokens=2, **given)


def test_model_that_beams_by_default_is_refused_too(
    model: HookedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own generation config counts where a call says nothing."""
    monkeypatch.setattr(model.network.generation_config, "num_beams", 4)
    with SteeringSession(model, plan):
        with pytest.raises(ModelError, match=r"generate\(num_beams=4\)"):
            model.network.generate(torch.tensor([PROMPT]), max_new_tokens=2)
        model.network.generate(torch.tensor([PROMPT]), max_new_tokens=2, num_beams=1)


def test_assistant_and_batches_of_requests_are_refused(model: HookedModel, plan: Plan) -> None:
    """Speculation with another model and continuous batching cannot be followed."""
    with SteeringSession(model, plan):
        with pytest.raises(ModelError, match=r"generate\(assistant_model=LlamaForCausalLM\)"):
            model.network.generate(torch.tensor([PROMPT]), assistant_model=model.network)
        with pytest.raises(ModelError, match="generate_batch packs several requests"):
            model.network.generate_batch([PROMPT])
        with pytest.raises(ModelError, match="position_ids do not rise"):
            model.network(torch.tensor([PROMPT]), position_ids=torch.arange(20)[None] % 10)


def test_methods_of_the_model_are_its_own_again(model: HookedModel, plan: Plan) -> None:
    """After the session nothing of its checks is left on the model."""
    with SteeringSession(model, plan):
        assert "generate" in vars(model.network)
    assert not {"generate", "generate_batch"} & set(vars(model.network))
    model.network.generate(torch.tensor([PROMPT]), max_new_tokens=2, num_beams=2)


def test_several_samples_of_a_prompt_are_each_steered(model: HookedModel, plan: Plan) -> None:
    """`num_return_sequences` only repeats the prompt: each sample's numbers are those of its own text."""
    with SteeringSession(model, plan) as session:
        torch.manual_seed(1)
        found = model.network.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=5,
            do_sample=True,
            num_return_sequences=3,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits: Tensor = torch.stack(found.logits, dim=1)
        assert len({tuple(row) for row in found.sequences.tolist()}) > 1
        for sequence, own in zip(found.sequences.tolist(), logits, strict=True):
            expected = session.logprobs(sequence, prompt_length=len(PROMPT))[len(PROMPT) - 1 : -1]
            assert (own.log_softmax(-1) - expected).abs().max() < 1e-4


def test_cache_that_was_changed_between_passes_is_refused(model: HookedModel, plan: Plan) -> None:
    """Reordered rows, cropped or exchanged tokens: the gates would belong to other texts than the cache."""
    batch, one = torch.tensor([PROMPT[:8], PROMPT[8:16]]), torch.tensor([[1], [2]])
    with SteeringSession(model, plan):
        cache = model.network(batch, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ModelError, match="not as the session's last pass left it"):
            model.network(one, past_key_values=cache)
        after = model.network(one, past_key_values=twin).past_key_values  # a true copy is what was left
        after.crop(-2)
        with pytest.raises(ModelError, match="holds 7 tokens of 2 sequences, but this session has seen 9"):
            model.network(torch.tensor([[1, 2], [3, 4]]), past_key_values=after)


def test_generation_that_begins_in_a_filled_cache_is_refused(model: HookedModel, plan: Plan) -> None:
    """A second turn over the first one's cache would be no prompt at all to the gates that read prompts."""
    with SteeringSession(model, plan):
        out = model.network.generate(
            torch.tensor([PROMPT[:8]]), max_new_tokens=3, return_dict_in_generate=True
        )
        turn = torch.cat([out.sequences, torch.tensor([[4, 5, 6]])], dim=1)
        with pytest.raises(ModelError, match="leave past_key_values out"):
            model.network.generate(turn, past_key_values=out.past_key_values, max_new_tokens=2)


def test_what_a_users_hook_has_saved_stays_what_it_was(model: HookedModel, plan: Plan) -> None:
    """No edit writes into a tensor that a hook was shown; hooks added inside are shown what edits made."""
    saved: list[tuple[str, Tensor, Tensor]] = []

    def watch(network: torch.nn.Module) -> list[Any]:
        def keep(name: str, *tensors: Any) -> None:
            saved.extend(
                (name, t, t.clone()) for t in tensors if isinstance(t, Tensor) and t.is_floating_point()
            )

        handles = []
        for name, module in network.named_modules():
            handles.append(module.register_forward_pre_hook(lambda _m, args, n=name: keep(n, *args)))
            handles.append(
                module.register_forward_hook(
                    lambda _m, args, out, n=name: keep(n, *args, *(out if isinstance(out, tuple) else (out,)))
                )
            )
        return handles

    before = watch(model.network)
    try:
        with SteeringSession(model, plan) as session:
            inside = watch(model.network)
            steered = session.logprobs(PROMPT)
            seen = {name: held for name, held, _ in saved}
            for handle in inside:
                handle.remove()
            assert torch.equal(session.logprobs(PROMPT), steered)
            edited = model.run_with_cache(PROMPT, ["1.resid_post"])[Site(1, "resid_post")]
    finally:
        for handle in before:
            handle.remove()
    assert len(saved) > 50
    for name, held, shown in saved:
        assert torch.equal(held, shown), name
    assert torch.equal(seen["model.layers.1"].flatten(0, -2), edited)
