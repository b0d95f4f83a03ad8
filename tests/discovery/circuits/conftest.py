"""A Llama whose circuit is known by construction: one head copies, a second one speaks the copy."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.pairs import Pair
from discovery.frozen_model import FrozenModel
from interpretops.artifacts.dictionary import (
    DictionaryManifest,
    ModelReference,
    WeightsReference,
    write_manifest,
)
from interpretops.model.spec import read_model_spec
from interpretops.plan import ModelSpec
from interpretops.plan.sites import Point
from mechctl.main import main

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


@pytest.fixture(scope="session")
def artifacts(known_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dictionaries of the known model: `words` (a feature for each word that was copied), `late`, `heads`."""
    root = tmp_path_factory.mktemp("artifacts")
    spec = read_model_spec(known_folder)
    point: Point
    for name, layer, point in (("words", 0, "resid_post"), ("late", 1, "resid_post"), ("heads", 0, "attn_z")):
        save_words(root / spec.name / name, spec, layer, point)
    return root


def save_words(folder: Path, spec: ModelSpec, layer: int, point: Point) -> Path:
    """A dictionary whose feature i is word i in the second third of the stream; 4 more never fire."""
    eye = np.zeros((WORDS + 4, 3 * WORDS), np.float32)
    eye[:WORDS, WORDS : 2 * WORDS] = np.eye(WORDS)
    eye[WORDS:, -1] = 1
    weights = {
        "W_enc": np.ascontiguousarray(eye.T),
        "W_dec": eye,
        "b_enc": np.repeat(np.array([0, -100], np.float32), [WORDS, 4]),
        "b_dec": np.zeros(3 * WORDS, np.float32),
        "threshold": np.full(WORDS + 4, 0.05, np.float32),
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": 3 * WORDS,
        "d_sae": WORDS + 4,
        "normalize_activations": "none",
        "apply_b_dec_to_input": True,
        "dtype": "float32",
        "device": "cpu",
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    manifest = DictionaryManifest(
        id=folder.name,
        layout="saelens",
        model=ModelReference(name=spec.name, fingerprint=spec.fingerprint),
        layer=layer,
        point=point,
        width=WORDS + 4,
        hidden_size=3 * WORDS,
        activation="jumprelu",
        weights=WeightsReference(
            file="sae_weights.safetensors",
            sha256=hashlib.sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest(),
        ),
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def mechctl(known_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs `mechctl search` on the known model; gives exit status, stdout, lines of stderr."""

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        words = ["mechctl", "search", "--model", known_folder, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip() and "Loading" not in line]
        return int(ended.value.code or 0), out, lines

    return run
