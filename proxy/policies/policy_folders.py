"""Looks into the folders that policies come from, and tells a folder that is empty from one it cannot see."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from proxy.policies.policy_files import file_digest

Source = Literal["policies", "file", "duplicate", "artifacts", "cards"]
"""What cannot be taken: a folder of policies, a file that is no policy, a file whose policy has another file,
the folder of dictionaries, the folder of Risk Cards."""
SOURCES: Final[tuple[Source, ...]] = get_args(Source)


@dataclass
class Listing:
    """What was found."""

    files: dict[Path, str] | None
    """Policy files by sha256; None when the folder itself cannot be looked into."""
    hidden: dict[Path, tuple[Source, str]] = field(default_factory=dict)
    """Folders that cannot be looked into, and why; what lies in them is not known, rather than gone."""

    def hides(self, path: Path) -> bool:
        """Whether a file may be there all the same."""
        return self.files is None or any(folder in path.parents for folder in self.hidden)


class PolicyFolders:
    """The folder of policies with the cards in it, and that of artifacts."""

    def __init__(self, policies: Path, artifacts: Path) -> None:
        self._policies = policies
        self._artifacts = artifacts
        self._seen: set[Path] = set()
        """Optional folders that were there once, so that it is told when they are gone."""

    def look(self) -> Listing:
        """Every ``*.yaml`` in the folder of policies, every ``policy.yaml`` below.

        Hidden ones are passed over, links to folders not followed. To be called beside the event loop.
        """
        found = Listing({})
        paths = _policy_paths(self._policies, found)
        if paths is None:
            found.files = None
        else:
            found.files = {path: file_digest(path) for path in sorted(paths)}
        models = self._look_into(self._artifacts, "artifacts", "paths.artifacts = ", found)
        for model in models:
            self._look_into(model, "artifacts", "paths.artifacts: ", found, keep=False)
        self._look_into(self._policies / "cards", "cards", "Risk Cards: ", found)
        return found

    def _look_into(
        self, folder: Path, source: Source, field_text: str, found: Listing, *, keep: bool = True
    ) -> list[Path]:
        """The folders in an optional folder. With ``keep`` it is missed when it was there once."""
        if folder.parent in found.hidden:
            return []
        try:
            with os.scandir(folder) as entries:
                inside = [Path(entry) for entry in entries if Path(entry).is_dir()]
        except OSError as error:
            if folder in self._seen or not isinstance(error, FileNotFoundError):
                found.hidden[folder] = source, _told(field_text, folder, error)
            return []
        if keep:
            self._seen.add(folder)
        return inside


def _policy_paths(top: Path, found: Listing) -> list[Path] | None:
    paths: list[Path] = []
    ahead = [top]
    while ahead:
        folder = ahead.pop()
        try:
            with os.scandir(folder) as entries:
                inside = [(Path(entry), entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            if folder != top and isinstance(error, FileNotFoundError):
                continue
            told = _told("paths.policies = ", folder, error)
            found.hidden[folder] = "policies", f"{told}; what was loaded keeps serving"
            if folder == top:
                return None
            continue
        for path, is_folder in inside:
            if path.name.startswith("."):
                continue
            if is_folder:
                ahead.append(path)
            if path.name == "policy.yaml" or (folder == top and path.suffix == ".yaml"):
                paths.append(path)
    return paths


def _told(field_text: str, folder: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{field_text}{folder}, but there is no such folder"
    return f"{field_text}{folder}, but it cannot be looked into ({error.strerror})"
