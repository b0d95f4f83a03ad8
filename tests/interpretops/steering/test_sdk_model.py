"""`HookedModel`: reading, generating, looking inside, and what it says when asked for the impossible."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import PROMPT, VOCAB, save_family

import interpretops
from interpretops import HookedModel
from interpretops.errors import ModelError, PlanError
from interpretops.plan import Site


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return HookedModel(save_family("LlamaForCausalLM", tmp_path_factory.mktemp("model")), dtype="float32")


def test_importing_the_library_loads_no_torch() -> None:
    """The SDK's names are there at once, torch only when they are used."""
    code = (
        "import sys, interpretops; assert 'torch' not in sys.modules; "
        "interpretops.SteeringSession; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"HookedModel", "SteeringSession"} <= set(interpretops.__all__)


def test_logprobs_are_rows_of_distributions(model: HookedModel) -> None:
    """One float32 row a token, each summing to one, as transformers itself has it."""
    rows = model.logprobs(PROMPT)
    assert (rows.shape, rows.dtype) == ((len(PROMPT), VOCAB), torch.float32)
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(len(PROMPT)))
    assert torch.equal(rows, model.network(torch.tensor([PROMPT])).logits[0].log_softmax(-1))


def test_greedy_generation_takes_the_likeliest_tokens(model: HookedModel) -> None:
    """Every generated token is the argmax of the row before it, and generation is repeatable."""
    answer = model.generate_tokens(PROMPT, 8)
    rows = model.logprobs(PROMPT + answer)
    assert answer == rows[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert model.generate_tokens(PROMPT, 8) == answer


def test_sampling_follows_its_seed(model: HookedModel) -> None:
    """Equal seeds give equal answers, others others, and the global random state is left alone."""
    state = torch.get_rng_state()
    answers = [model.generate_tokens(PROMPT, 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_ends_at_a_stop_token_or_the_context(
    model: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop token is not part of the answer, and no position past the model's context is asked for."""
    answer = model.generate_tokens(PROMPT, 8)
    monkeypatch.setattr(model.network.generation_config, "eos_token_id", [answer[3]])
    assert model.generate_tokens(PROMPT, 8) == answer[: answer.index(answer[3])]
    monkeypatch.undo()
    most = model.network.config.max_position_embeddings
    assert len(model.generate_tokens(PROMPT * 6, 64)) == most - 6 * len(PROMPT) + 1


def test_activations_come_by_site(model: HookedModel) -> None:
    """Each wanted site is there with its width, written as text or as `Site`, and no hook stays."""
    kept = model.run_with_cache(PROMPT, ["0.attn_z", Site(2, "resid_post")])
    assert not any(module._forward_hooks for module in model.network.modules())
    assert {str(site): tuple(x.shape) for site, x in kept.items()} == {
        "0.attn_z": (len(PROMPT), 128),
        "2.resid_post": (len(PROMPT), 64),
    }
    hidden = model.network(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    normed = model.network.model.norm(kept[Site(2, "resid_post")])
    torch.testing.assert_close(normed, hidden[-1][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype = 'int8', but must be one of"),
        ({"dtype": torch.float64}, "dtype = 'float64'"),
        ({"device": "tpu:x"}, "device = 'tpu:x', but must be"),
        ({"device": "meta"}, "device = 'meta', but must be"),
        ({"device": "cuda:99"}, "device = 'cuda:99', but torch finds"),
    ],
)
def test_wrong_options_are_named(model: HookedModel, options: dict[str, Any], message: str) -> None:
    """A wrong option stops before anything is loaded, with its name, value and what would be right."""
    with pytest.raises(ModelError, match=message):
        HookedModel(model.folder, **options)


def test_missing_model_is_named(tmp_path: Path) -> None:
    """A name that is neither a folder nor a hub id is refused, and so is a folder without weights."""
    with pytest.raises(ModelError, match="no-such-model"):
        HookedModel("no-such-model", cache_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        HookedModel(tmp_path / "empty")


def test_pickled_weights_are_not_loaded(model: HookedModel, tmp_path: Path) -> None:
    """A folder whose weights are a pickle is refused."""
    model.network.config.save_pretrained(tmp_path)
    torch.save(model.network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        HookedModel(tmp_path)


def test_wrong_tokens_are_named(model: HookedModel) -> None:
    """Ids out of the vocabulary, none at all, nested ones, too many: each is said plainly."""
    for tokens, error, message in (
        ([0, VOCAB], ValueError, "0..128, but .* has 0..127"),
        ([], ValueError, "non-empty"),
        ([[1, 2]], ValueError, "flat"),
        ([1] * 129, ModelError, "at most 128"),
    ):
        with pytest.raises(error, match=message):
            model.logprobs(tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        model.generate_tokens(PROMPT, 0)
    with pytest.raises(ValueError, match="temperature = -1"):
        model.generate_tokens(PROMPT, temperature=-1)


def test_wrong_sites_are_named(model: HookedModel) -> None:
    """A layer the model lacks, or a point that is none."""
    with pytest.raises(ModelError, match=r"site = 3\.resid_post, but LlamaForCausalLM has layers 0\.\.2"):
        model.run_with_cache(PROMPT, ["3.resid_post"])
    with pytest.raises(PlanError, match="resid_mid"):
        model.run_with_cache(PROMPT, ["1.resid_mid"])


def test_model_without_tokenizer_takes_ids_but_no_text(model: HookedModel) -> None:
    """Where no tokenizer lies beside the weights, text is refused in one line."""
    with pytest.raises(ModelError, match="no tokenizer"):
        model.generate("hello")
