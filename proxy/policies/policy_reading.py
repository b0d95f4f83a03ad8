"""Reads and compiles policies beside the event loop: a file that hangs keeps only itself from serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from interpretops.plan import ModelSpec
from proxy.observe.unforeseen_error import told
from proxy.policies.policy_files import BrokenPolicyError, Revision, compile_file, file_digest
from proxy.policies.policy_folders import Listing, PolicyFolders
from proxy.process.file_reader import Reader, StuckError

_COMPILE_S: Final = 600.0
"""Long enough for the checksum of a large dictionary on a slow disk."""


@dataclass(frozen=True)
class Read:
    """What a file was found to be."""

    path: Path
    digest: str
    """Of the content that was compiled."""
    result: Revision | BrokenPolicyError


class PolicyReading:
    """Nothing here holds a lock of the catalogue, so that a rollback never waits for a file."""

    def __init__(self, folder: Path, artifacts: Path) -> None:
        self._folder = folder
        self._artifacts = artifacts
        self._folders = PolicyFolders(folder, artifacts)
        self._listing = Reader(f"paths.policies = {folder}")
        self._files: dict[Path, Reader] = {}

    async def look(self) -> Listing:
        """What lies in the folders now. One that hangs cannot be looked into."""
        try:
            return await self._listing.run(self._folders.look)
        except StuckError as error:
            return Listing(None, {self._folder: ("policies", f"{error}; what was loaded keeps serving")})

    async def compile(self, model: ModelSpec, path: Path, digest: str) -> Read:
        """A file as it is now; ``digest`` is what it was when it was listed."""
        while True:
            result = await self._compile(model, path)
            now = await self._digest(path) if isinstance(result, BrokenPolicyError) else digest
            if now == digest:
                return Read(path, digest, result)
            # Half written when it was read.
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
            # One file that nobody foresaw must not keep the others from being read.
            facts = told(error)
            return BrokenPolicyError(
                None, f"{path}: cannot be compiled: unforeseen {facts['kind']} at {facts['place']}; report it"
            )

    async def _digest(self, path: Path) -> str:
        try:
            return await self._files[path].run(file_digest, path)
        except StuckError as error:
            return str(error)
