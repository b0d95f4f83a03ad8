"""Reads and compiles policies off the event loop. A read that hangs delays only its own file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from interpretops.plan import ModelSpec
from proxy.observe.unforeseen_error import describe_error
from proxy.policies.policy_files import BrokenPolicyError, Revision, compile_file, file_digest
from proxy.policies.policy_folders import Listing, PolicyFolders
from proxy.process.file_reader import Reader, StuckError

_COMPILE_S: Final = 600.0
"""Long enough for the checksum of a large dictionary on a slow disk."""


@dataclass(frozen=True)
class Read:
    """The result of reading one file."""

    path: Path
    digest: str
    """Digest of the compiled content."""
    result: Revision | BrokenPolicyError


class PolicyReading:
    """Never holds the catalogue's lock, so that a rollback never waits for a file."""

    def __init__(self, folder: Path, artifacts: Path) -> None:
        self._folder = folder
        self._artifacts = artifacts
        self._folders = PolicyFolders(folder, artifacts)
        self._listing = Reader(f"paths.policies = {folder}")
        self._files: dict[Path, Reader] = {}

    async def scan(self) -> Listing:
        """List the folders. A folder that hangs counts as unreadable."""
        try:
            return await self._listing.run(self._folders.scan)
        except StuckError as error:
            return Listing(None, {self._folder: ("policies", f"{error}; loaded policies keep serving")})

    async def compile(self, model: ModelSpec, path: Path, digest: str) -> Read:
        """Compile a file. ``digest`` is its digest when it was listed."""
        while True:
            result = await self._compile(model, path)
            now = await self._digest(path) if isinstance(result, BrokenPolicyError) else digest
            if now == digest:
                return Read(path, digest, result)
            # The file was being written while we read it; read it again.
            digest = now

    async def _compile(self, model: ModelSpec, path: Path) -> Revision | BrokenPolicyError:
        reader = self._files.setdefault(path, Reader(str(path), _COMPILE_S))
        try:
            return await reader.run(compile_file, path, model, self._artifacts, self._folder)
        except BrokenPolicyError as error:
            return error
        except StuckError as error:
            return BrokenPolicyError(None, str(error))
        except Exception as error:
            # An unexpected error in one file must not stop the others from being read.
            facts = describe_error(error)
            return BrokenPolicyError(
                None,
                f"{path}: cannot be compiled: unexpected {facts['kind']} at {facts['place']}; report it",
            )

    async def _digest(self, path: Path) -> str:
        try:
            return await self._files[path].run(file_digest, path)
        except StuckError as error:
            return str(error)
