"""Lists the folders that policies come from, and distinguishes empty folders from unreadable ones."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from proxy.policies.policy_files import file_digest

Source = Literal["policies", "file", "duplicate", "artifacts", "cards"]
"""What is broken: a policy folder, a policy file, a duplicate policy file, the dictionaries folder, or the
Risk Cards folder."""
SOURCES: Final[tuple[Source, ...]] = get_args(Source)


@dataclass
class Listing:
    """Result of a scan."""

    files: dict[Path, str] | None
    """Policy file to sha256; None when the top folder cannot be read."""
    hidden: dict[Path, tuple[Source, str]] = field(default_factory=dict)
    """Unreadable folders, and why. Their content is unknown, not deleted."""

    def hides(self, path: Path) -> bool:
        """Whether the file may still exist in an unreadable folder."""
        return self.files is None or any(folder in path.parents for folder in self.hidden)


class PolicyFolders:
    """The policy folder with its Risk Cards, and the artifacts folder."""

    def __init__(self, policies: Path, artifacts: Path) -> None:
        self._policies = policies
        self._artifacts = artifacts
        self._seen: set[Path] = set()
        """Optional folders seen before, so that their loss is reported."""

    def scan(self) -> Listing:
        """Find every ``*.yaml`` in the policy folder, and every ``policy.yaml`` below it.

        Skips hidden entries and does not follow links to folders. Blocking: call it off the event loop.
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
        """The subfolders of an optional folder. With ``keep``, report it if it disappears later."""
        if folder.parent in found.hidden:
            return []
        try:
            with os.scandir(folder) as entries:
                inside = [Path(entry) for entry in entries if Path(entry).is_dir()]
        except OSError as error:
            if folder in self._seen or not isinstance(error, FileNotFoundError):
                found.hidden[folder] = source, _folder_error(field_text, folder, error)
            return []
        if keep:
            self._seen.add(folder)
        return inside


def _policy_paths(top: Path, found: Listing) -> list[Path] | None:
    paths: list[Path] = []
    pending = [top]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as entries:
                inside = [(Path(entry), entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            if folder != top and isinstance(error, FileNotFoundError):
                continue
            error_text = _folder_error("paths.policies = ", folder, error)
            found.hidden[folder] = "policies", f"{error_text}; loaded policies keep serving"
            if folder == top:
                return None
            continue
        for path, is_folder in inside:
            if path.name.startswith("."):
                continue
            if is_folder:
                pending.append(path)
            if path.name == "policy.yaml" or (folder == top and path.suffix == ".yaml"):
                paths.append(path)
    return paths


def _folder_error(field_text: str, folder: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{field_text}{folder}, but there is no such folder"
    return f"{field_text}{folder}, but it cannot be read ({error.strerror})"
