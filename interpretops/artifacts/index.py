"""Finds the dictionaries and adapters of a model in the artifacts folder."""

import os
from functools import cached_property
from pathlib import Path

from interpretops.artifacts.adapter import Adapter, open_adapter
from interpretops.artifacts.dictionary import Dictionary, DictionaryManifest, open_dictionary, read_manifest
from interpretops.artifacts.dictionary.manifest import MANIFEST_NAME, AdapterManifest, read_adapter_manifest
from interpretops.artifacts.norm_bounds import BOUNDS_NAME, read_norm_bounds
from interpretops.errors import AdapterError, DictionaryError
from interpretops.plan import ModelSpec, Site

ADAPTERS_FOLDER = "adapters"


class Artifacts:
    """``<root>/<model>/<dictionary>/`` and ``<root>/<model>/adapters/<adapter>/``, each with a manifest, and
    ``<root>/<model>/norm-bounds.yaml``.

    The fingerprint in the manifest decides which model an artifact belongs to, not the folder's name.
    """

    def __init__(self, root: Path, model: ModelSpec) -> None:
        self.root = root
        self.model = model
        self.unreadable: list[str] = []
        """One line for each unreadable manifest."""
        self._opened: dict[Path, Dictionary] = {}

    @cached_property
    def all_dictionaries(self) -> dict[Path, DictionaryManifest]:
        """Manifests of every dictionary of every model, by folder."""
        found = {}
        for path in sorted(self.root.glob(f"*/*/{MANIFEST_NAME}")):
            try:
                found[path.parent] = read_manifest(path.parent)
            except DictionaryError as error:
                self.unreadable.append(str(error).splitlines()[0])
        return found

    @cached_property
    def all_adapters(self) -> dict[Path, AdapterManifest]:
        """Manifests of every adapter of every model, by folder."""
        found = {}
        for path in sorted(self.root.glob(f"*/{ADAPTERS_FOLDER}/*/{MANIFEST_NAME}")):
            try:
                found[path.parent] = read_adapter_manifest(path.parent)
            except AdapterError as error:
                self.unreadable.append(str(error).splitlines()[0])
        return found

    @property
    def model_folders(self) -> tuple[Path, ...]:
        """Folders of this model: the one with its name, then those with artifacts of its fingerprint."""
        folders = [self.root / self.model.name]
        folders += [f.parent for f, m in self.all_dictionaries.items() if self._is_ours(m)]
        folders += [f.parent.parent for f, m in self.all_adapters.items() if self._is_ours(m)]
        return tuple(dict.fromkeys(folders))

    def _is_ours(self, manifest: DictionaryManifest | AdapterManifest) -> bool:
        return manifest.model.fingerprint == self.model.fingerprint

    def dictionaries_at(self, site: Site) -> dict[Path, DictionaryManifest]:
        """This model's dictionaries at a site, by folder."""
        return {
            folder: manifest
            for folder, manifest in self.all_dictionaries.items()
            if self._is_ours(manifest) and manifest.site == site
        }

    @cached_property
    def norm_bounds(self) -> dict[str, float]:
        """The model's recorded norm bounds, by site; raises `DictionaryError` if the record is unreadable."""
        found: dict[Path, dict[str, float]] = {}
        for path in sorted(self.root.glob(f"*/{BOUNDS_NAME}")):
            try:
                record = read_norm_bounds(path)
            except DictionaryError:
                if path.parent.name == self.model.name:
                    raise
                continue
            if record.model.fingerprint == self.model.fingerprint:
                found[path] = record.bounds
        if len(found) > 1:
            places = ", ".join(map(str, found))
            raise DictionaryError(f"{self.model.name} has several records of norm bounds: {places}; keep one")
        return next(iter(found.values()), {})

    def manifests_named(self, name: str) -> list[DictionaryManifest]:
        """Manifests of this model's dictionaries with this id."""
        return [m for m in self.all_dictionaries.values() if m.id == name and self._is_ours(m)]

    def dictionary(self, site: Site) -> Dictionary:
        """This model's only dictionary at a site; raises `DictionaryError` if there are none or several."""
        found = self.dictionaries_at(site)
        if len(found) == 1:
            return self._open(next(iter(found)))
        if found:
            ids = ", ".join(manifest.id for manifest in found.values())
            raise DictionaryError(f"{self.model.name} has several dictionaries at {site}: {ids}; name one")
        raise DictionaryError(f"{self.model.name} has no dictionary at {site}; {self._what_there_is()}")

    def named_dictionary(self, name: str) -> Dictionary:
        """This model's dictionary with this id; raises `DictionaryError`, also if it is another model's."""
        named = {f: m for f, m in self.all_dictionaries.items() if m.id == name}
        ours = [f for f, m in named.items() if self._is_ours(m)]
        if len(ours) == 1:
            return self._open(ours[0])
        if ours:
            places = ", ".join(str(folder) for folder in ours)
            raise DictionaryError(f"several dictionaries have this id: {places}; rename all but one")
        if named:
            other = next(iter(named.values())).model
            raise DictionaryError(
                f"it is a dictionary of {other.name} (fingerprint {other.fingerprint[:12]}), and the "
                f"model is {self.model.name} (fingerprint {self.model.fingerprint[:12]})"
            )
        raise DictionaryError(f"there is no such dictionary; {self._what_there_is()}")

    def adapter(self, name: str | None, target_class: str) -> Adapter:
        """This model's adapter with this id, or its only one for a target class; raises `AdapterError`."""
        ours = {folder: manifest for folder, manifest in self.all_adapters.items() if self._is_ours(manifest)}
        if name is not None:
            found = [folder for folder, manifest in ours.items() if manifest.id == name]
            wanted = f"adapter {name!r}"
        else:
            found = [folder for folder, manifest in ours.items() if manifest.target_class == target_class]
            wanted = f"adapter for target class {target_class!r}"
        if len(found) == 1:
            return open_adapter(found[0])
        if found:
            ids = ", ".join(ours[folder].id for folder in found)
            raise AdapterError(f"{self.model.name} has several {wanted}: {ids}; name one with 'adapter'")
        there = ", ".join(f"{m.id} for {m.target_class}" for m in ours.values()) or "none at all"
        raise AdapterError(
            f"{self.root} has no {wanted} of {self.model.name}; there is {there}{self._broken()}"
        )

    def _open(self, folder: Path) -> Dictionary:
        if folder not in self._opened:
            self._opened[folder] = open_dictionary(folder, self.all_dictionaries[folder])
        return self._opened[folder]

    def _what_there_is(self) -> str:
        ours = [m for m in self.all_dictionaries.values() if self._is_ours(m)]
        if ours:
            return f"there is {', '.join(f'{m.id} at {m.layer}.{m.point}' for m in ours)}{self._broken()}"
        others = sorted({m.model.name for m in self.all_dictionaries.values()})
        text = f"{self.root} has none of this model"
        if self.model.name in others:
            text += " (those under its name belong to other weights: their fingerprint differs)"
        return f"{text}; train one with `mechctl sae-train`{self._broken()}"

    def _broken(self) -> str:
        wrong = list(self.unreadable)
        try:
            os.scandir(self.root).close()
        except OSError as error:
            wrong.insert(0, f"{self.root}: {error.strerror}")
        return f" (unreadable: {'; '.join(wrong)})" if wrong else ""
