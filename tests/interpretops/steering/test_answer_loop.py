"""The one generation loop writes what transformers' own writes, token for token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import CONFIGS, PROMPT, save_family

from interpretops.steering.answer_loop import continue_tokens, drawn, greedy, pad_tokens, positions_of
from interpretops.steering.causal_model import CausalModel

PROMPTS = [PROMPT, PROMPT[:3], PROMPT[2:] * 2]
MOST = 12


def transformers_answers(model: CausalModel, stops: list[int], seed: int | None) -> list[list[int]]:
    """What `generate` writes, cut behind the first stop token."""
    tokens, mask = pad_tokens(PROMPTS, 0, model.device, "left")
    chance: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        chance = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    out = model.network.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=MOST,
        eos_token_id=stops,
        pad_token_id=0,
        **chance,
    )
    found = []
    for row in out[:, tokens.shape[1] :].tolist():
        ends = [place for place, token in enumerate(row) if token in stops]
        found.append(row[: ends[0] + 1] if ends else row)
    return found


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    folder: Path = save_family(request.param, tmp_path_factory.mktemp("model"))
    return CausalModel(folder, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_padded_batch_is_continued_as_transformers_does(model: CausalModel, seed: int | None) -> None:
    """Greedy and drawn, in every family, with sequences that end early beside others that go on."""
    free = transformers_answers(model, [model.spec.vocab_size - 1], seed)
    stops = [free[0][4]]
    tokens, mask = pad_tokens(PROMPTS, 0, model.device, "left")
    choose = greedy if seed is None else drawn(torch.Generator().manual_seed(seed))
    found = continue_tokens(model.network, tokens, MOST, mask=mask, stops=stops, pad=0, choose=choose)
    assert found == transformers_answers(model, stops, seed)
    assert len({len(answer) for answer in found}) > 1


def test_known_prompt_is_continued_from_its_cache(model: CausalModel) -> None:
    """Keys and values of all but the last token, and that one token, give the answers of whole prompts."""
    tokens, mask = pad_tokens(PROMPTS, 0, model.device, "left")
    whole = continue_tokens(model.network, tokens, MOST, mask=mask, stops=(), pad=0)
    with torch.no_grad():
        before = mask[:, :-1]
        cache = model.network.base_model(
            input_ids=tokens[:, :-1], attention_mask=before, position_ids=positions_of(before), use_cache=True
        ).past_key_values
    passes: list[int] = []
    found = continue_tokens(
        model.network,
        tokens[:, -1:],
        MOST,
        mask=mask,
        cache=cache,
        stops=(),
        pad=0,
        after_pass=lambda: passes.append(1),
    )
    assert found == whole
    assert len(passes) == MOST


def test_sequence_alone_needs_no_mask(model: CausalModel) -> None:
    """Without a mask a prompt is continued as with a mask of ones."""
    for prompt in PROMPTS:
        tokens, mask = pad_tokens([prompt], 0, model.device)
        with_mask = continue_tokens(model.network, tokens, MOST, mask=mask, stops=(), pad=0)
        assert continue_tokens(model.network, tokens, MOST, stops=(), pad=0) == with_mask


def test_padding_stands_on_its_side_under_a_mask_of_zeros() -> None:
    """Right and left, and the mask counts each sequence's own tokens."""
    tokens, mask = pad_tokens([[1, 2, 3], [4]], 9, torch.device("cpu"))
    assert (tokens.tolist(), mask.tolist()) == ([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])
    tokens, mask = pad_tokens([[1, 2, 3], [4]], 9, torch.device("cpu"), "left")
    assert (tokens.tolist(), mask.tolist()) == ([[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]])
    assert positions_of(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


@pytest.mark.slow
def test_default_model_answers_as_with_transformers(default_model_dir: Path) -> None:
    """Chat prompts of several lengths on the model that ships, in bfloat16: greedy and drawn."""
    model = CausalModel(default_model_dir, torch.bfloat16, torch.device("cpu"))
    asked = ["Name three rivers.", "What is two and two? Answer in one word.", "Why is the sky blue?" * 5]
    prompts = [model.conversation_ids([{"role": "user", "content": text}]) for text in asked]
    tokens, mask = model.pad(prompts, "left")
    for seed in (None, 11):
        chance: dict[str, Any] = {"do_sample": False}
        if seed is not None:
            torch.manual_seed(seed)
            chance = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        out = model.network.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=40,
            eos_token_id=model.stop_ids,
            pad_token_id=model.pad_id,
            **chance,
        )
        rows = out[:, tokens.shape[1] :].tolist()
        ends = [next((i for i, t in enumerate(row) if t in model.stop_tokens), 40) + 1 for row in rows]
        expected = [row[:end] for row, end in zip(rows, ends, strict=True)]
        assert model.answers(prompts, 40, sample_seed=seed) == expected
