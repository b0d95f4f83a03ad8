"""A Llama whose circuit is known by construction: one head copies, a second one speaks the copy."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.pairs import Pair
from discovery.frozen_model import FrozenModel

WORDS = 16
"""Vocabulary, and width of each of the three parts of the stream: what is read, copied, spoken."""


def build_known_circuit(noise: float) -> LlamaForCausalLM:
    """Three layers of three heads. Attention is even everywhere (no query sees a difference), so that

    head 1 of layer 0 writes the mean embedding of the words so far into the second third of the stream,
    head 0 of layer 2 writes what stands there into the last third, and the logits read only that one.
    All other heads and all MLPs write random noise.
    """
    torch.manual_seed(3)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=3 * WORDS,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=WORDS,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )
    read, copied, spoken = (slice(WORDS * part, WORDS * (part + 1)) for part in range(3))
    eye = torch.eye(WORDS)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn_like(weight) * noise)
            if "q_proj" in name or "k_proj" in name:
                weight.zero_()
        network.model.embed_tokens.weight.zero_()
        network.model.embed_tokens.weight[:, read] = eye
        network.lm_head.weight.zero_()
        network.lm_head.weight[:, spoken] = eye
        for layer, head, source, target in ((0, 1, read, copied), (2, 0, copied, spoken)):
            attention = network.model.layers[layer].self_attn
            rows = slice(WORDS * head, WORDS * (head + 1))
            attention.v_proj.weight[rows] = 0
            attention.v_proj.weight[rows, source] = eye
            attention.o_proj.weight[:, rows] = 0
            attention.o_proj.weight[target, rows] = 4 * eye
    return network


def save_known_circuit(folder: Path, noise: float = 0.02) -> Path:
    """The model with a tokenizer of the words w0..w15, as a folder."""
    build_known_circuit(noise).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def known_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_known_circuit(tmp_path_factory.mktemp("known") / "known-circuit")


@pytest.fixture(scope="session")
def known(known_folder: Path) -> GraphDecoder:
    """The known circuit among little noise."""
    return GraphDecoder(FrozenModel(known_folder, torch.float32))


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> GraphDecoder:
    """The known circuit among so much noise that every edge matters a little."""
    folder = save_known_circuit(tmp_path_factory.mktemp("noisy") / "noisy", noise=0.25)
    return GraphDecoder(FrozenModel(folder, torch.float32))


def word_pairs(count: int = 12) -> list[Pair]:
    """Prompts of 4 or 5 words; the first is the answer, another one in the corrupted prompt."""
    found = []
    for index in range(count):
        right, wrong = 1 + index % 7, 8 + index % 7
        rest = (0, 15, 0, 15)[: 3 + index % 2]
        found.append(Pair((right, *rest), (wrong, *rest), (right,), (wrong,)))
    return found


@pytest.fixture
def pairs() -> list[Pair]:
    return word_pairs()


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """The same contrasts as text."""
    rows = [
        {
            "clean": " ".join(f"w{i}" for i in pair.clean),
            "corrupted": " ".join(f"w{i}" for i in pair.corrupted),
            "answer": f"w{pair.answers[0]}",
            "wrong": [f"w{pair.wrong[0]}"],
            "paraphrase": f"{len(pair.clean)} words",
        }
        for pair in word_pairs()
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
