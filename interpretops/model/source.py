"""Resolves a model name to a local folder: the default model, a folder, or a Hugging Face id."""

import re
from pathlib import Path

from interpretops.errors import ModelError
from interpretops.files.atomic_folder import whole_folder
from interpretops.model.default_model import DEFAULT_MODEL, Progress, _silent, ensure_default_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Files to download: never pickled weights, never code."""


def resolve_model(
    name: str, cache_dir: Path, progress: Progress = _silent, *, revision: str | None = None
) -> Path:
    """The folder of the model called ``name``. The folder's name is the model's name everywhere.

    The default model is created in the cache, and a folder is used as it is. Anything of the form
    ``owner/name`` is downloaded from the Hugging Face hub or found in its cache. Raises `ModelError`.
    """
    if name == DEFAULT_MODEL:
        return ensure_default_model(cache_dir, progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.name = {name!r}, but that folder has no config.json; name a model folder"
            )
        return folder.resolve()
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"model.name = {name!r}, but that is neither a folder nor a Hugging Face id (owner/name); "
            f"omit it to serve {DEFAULT_MODEL}"
        )
    snapshot = _download(name, revision, progress)
    if not any(snapshot.glob("*.safetensors")):
        raise ModelError(
            f"model.name = {name!r}, but it has no *.safetensors files, the only weights that are loaded"
        )
    return _name_snapshot(snapshot, cache_dir.expanduser().resolve() / "models" / name.replace("/", "--"))


def _download(name: str, revision: str | None, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    progress(f"Fetching {name} from the Hugging Face hub, or its cache")
    at = "" if revision is None else f" (model.revision = {revision!r})"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except GatedRepoError as error:
        raise ModelError(
            f"model.name = {name!r}, but its licence must be accepted first; do so at "
            f"https://huggingface.co/{name} and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.name = {name!r}{at}, but the hub has no such revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model.name = {name!r}, but the hub has no such model; "
            "correct the id, or set HF_TOKEN if it is private"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model.name = {name!r}{at}, but it is not in the local cache and the hub cannot be reached; "
            "go online, or name a model folder"
        ) from error


def _name_snapshot(snapshot: Path, folder: Path) -> Path:
    """Link a snapshot's files into ``folder``, because the hub's own folder is named after a commit."""
    wanted = {path.name: path.resolve() for path in snapshot.iterdir() if path.is_file()}
    if folder.is_dir() and {path.name: path.resolve() for path in folder.iterdir()} == wanted:
        return folder
    try:
        with whole_folder(folder) as draft:
            for name, target in wanted.items():
                (draft / name).symlink_to(target)
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written ({error.strerror or error}); set cache.dir to another folder"
        ) from error
    return folder
