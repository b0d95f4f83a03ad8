"""Resolves the dictionaries, vectors and adapters that a policy names, and checks them against the model."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from interpretops.artifacts import Artifacts
from interpretops.artifacts.adapter import Adapter
from interpretops.artifacts.dictionary import Dictionary, DictionaryManifest
from interpretops.artifacts.vectors import (
    FileProbe,
    FileVector,
    find_vector_file,
    read_attention_probe,
    read_vector,
)
from interpretops.compile.fault_list import FaultList
from interpretops.errors import AdapterError, DictionaryError, PolicyError
from interpretops.files.strict_yaml import KeyPath
from interpretops.plan import Array, ModelSpec, Site
from interpretops.policy import DirectionAblation, FeatureClamp, FeatureScale, Policy, SteeringVector
from interpretops.policy.fields import Vector

Read = TypeVar("Read", FileProbe, FileVector)


class Sources:
    """Resolves the names in one policy. Anything that does not fit is added to the fault list.

    ``provenance`` collects the sha256 of every artifact used.
    """

    def __init__(self, policy: Policy, model: ModelSpec, artifacts: Artifacts, faults: FaultList) -> None:
        self.policy = policy
        self.model = model
        self.artifacts = artifacts
        self.faults = faults
        self.provenance: dict[str, dict[str, Any]] = {"dictionaries": {}, "adapters": {}, "vectors": {}}

    def layer_fits(self, path: KeyPath, layer: int) -> bool:
        """Whether the model has the layer."""
        if layer < self.model.num_layers:
            return True
        self.faults.add(path, f"= {layer}, but {self.model.name} has layers 0..{self.model.num_layers - 1}")
        return False

    def heads_fit(self, path: KeyPath, heads: tuple[int, ...]) -> bool:
        """Whether the model has all the heads."""
        wrong = [(index, head) for index, head in enumerate(heads) if head >= self.model.num_heads]
        for index, head in wrong:
            text = f"= {head}, but {self.model.name} has heads 0..{self.model.num_heads - 1}"
            self.faults.add((*path, index), text)
        return not wrong

    def norm_bound(self, site: Site) -> float:
        """The norm bound of a direction at a site; infinite if none is known.
        It is the smallest of the model's recorded bound and the bounds of the dictionaries that the policy
        uses there. Other dictionaries in the folder do not count.
        """
        try:
            recorded = self.artifacts.norm_bounds.get(str(site))
        except DictionaryError as error:
            raise PolicyError(*str(error).splitlines()) from error
        used = (manifest.max_norm for manifest in self._used_dictionaries if manifest.site == site)
        return min((bound for bound in (recorded, *used) if bound is not None), default=float("inf"))

    @cached_property
    def _used_dictionaries(self) -> list[DictionaryManifest]:
        """Manifests of the dictionaries that the policy names, or implies where a site has only one."""
        found: list[DictionaryManifest] = []
        for name, site in _dictionary_references(self.policy):
            if name is None:
                there = list(self.artifacts.dictionaries_at(site).values())
                found += there if len(there) == 1 else []
            else:
                found += self.artifacts.manifests_named(name)
        return found

    def features(
        self, path: KeyPath, site: Site, name: str | None, ids: Mapping[KeyPath, int]
    ) -> Dictionary | None:
        """The dictionary named at ``path``, or the only one at the site, when it has all the features."""
        dictionary = self._dictionary(path, site, name)
        if dictionary is None:
            return None
        if dictionary.site != site:
            self.faults.add(
                (*path, "dictionary"), f"= {name!r}, but it reads at {dictionary.site} and not at {site}"
            )
            return None
        return dictionary if self._ids_fit(dictionary, ids) else None

    def vector(self, path: KeyPath, vector: Vector, site: Site) -> Array:
        """The direction, [D]; ones if there is a fault, so that compiling can go on and find more faults."""
        width = self.model.width(site.point)
        found = (
            self._feature_vector(path, vector, site, width)
            if vector.file is None
            else self._file_vector(path, vector, width)
        )
        return np.ones(width, np.float32) if found is None else found

    def attention_probe(self, path: KeyPath, name: str, site: Site) -> FileProbe | None:
        """The attention probe in a file, or None after a fault."""
        width = self.model.width(site.point)
        return self._read(path, name, lambda file: read_attention_probe(file, width))

    def adapter(self, path: KeyPath, name: str | None) -> Adapter | None:
        """The adapter named, or the one for the policy's target class."""
        try:
            adapter = self.artifacts.adapter(name, self.policy.meta.target_class)
        except AdapterError as error:
            if name is None:
                self.faults.add(path, f"names no 'adapter', and {error}")
            else:
                self.faults.add((*path, "adapter"), f"= {name!r}, but {error}")
            return None
        manifest = adapter.manifest
        self.provenance["adapters"][manifest.id] = {"sha256": manifest.weights.sha256}
        return adapter

    def adapter_fits(self, path: KeyPath, adapter: Adapter, site: Site, width: int) -> bool:
        """Whether the model has the adapter's site, with the adapter's width."""
        if site.layer < self.model.num_layers and width == self.model.read_width(site.point):
            return True
        self.faults.add(
            path, f"uses adapter {adapter.manifest.id}, whose part at {site} does not fit {self.model.name}"
        )
        return False

    def _dictionary(self, path: KeyPath, site: Site, name: str | None) -> Dictionary | None:
        try:
            if name is None:
                dictionary = self.artifacts.dictionary(site)
            else:
                dictionary = self.artifacts.named_dictionary(name)
        except DictionaryError as error:
            if name is None:
                self.faults.add((*path, "layer"), f"= {site.layer}, but {error}")
            else:
                self.faults.add((*path, "dictionary"), f"= {name!r}, but {error}")
            return None
        manifest = dictionary.manifest
        width = self.model.width(manifest.point)
        if manifest.hidden_size != width or manifest.layer >= self.model.num_layers:
            self.faults.add(
                path, f"uses {manifest.id}, which does not fit {self.model.name}: activation of {width}"
            )
            return None
        self.provenance["dictionaries"][manifest.id] = {
            "sha256": manifest.weights.sha256,
            "site": str(dictionary.site),
        }
        return dictionary

    def _ids_fit(self, dictionary: Dictionary, ids: Mapping[KeyPath, int]) -> bool:
        wrong = {path: feature for path, feature in ids.items() if feature >= dictionary.width}
        for path, feature in wrong.items():
            name = dictionary.manifest.id
            self.faults.add(
                path, f"= {feature}, but dictionary {name} has features 0..{dictionary.width - 1}"
            )
        return not wrong

    def _feature_vector(self, path: KeyPath, vector: Vector, site: Site, width: int) -> Array | None:
        assert vector.feature is not None
        dictionary = self._dictionary(path, site, vector.dictionary)
        if dictionary is None or not self._ids_fit(dictionary, {(*path, "feature"): vector.feature}):
            return None
        row: Array = dictionary.decoder_rows([vector.feature])[0]
        if row.shape != (width,) or not np.any(row):
            self.faults.add(
                path, f"= feature {vector.feature} of {dictionary.manifest.id}: unusable at {site}"
            )
            return None
        return row

    def _file_vector(self, path: KeyPath, vector: Vector, width: int) -> Array | None:
        assert vector.file is not None
        found = self._read((*path, "file"), vector.file, lambda file: read_vector(file, vector.tensor, width))
        return None if found is None else found.values

    def _read(self, path: KeyPath, name: str, read: Callable[[Path], Read]) -> Read | None:
        """Read a file of the policy or the artifacts; add a fault unless it was made from this model."""
        try:
            found = read(find_vector_file(name, self.policy.folder, self.artifacts.model_folders))
        except PolicyError as error:
            self.faults.add(path, f"= {name!r}, but {error}")
            return None
        if found.model_fingerprint not in (None, self.model.fingerprint):
            self.faults.add(
                path,
                f"= {name!r}, but it was made from a model of fingerprint "
                f"{str(found.model_fingerprint)[:12]}; {self.model.name} has {self.model.fingerprint[:12]}",
            )
            return None
        self.provenance["vectors"][name] = {"sha256": found.sha256}
        return found


def _dictionary_references(policy: Policy) -> Iterator[tuple[str | None, Site]]:
    """Every dictionary reference in a policy (None if the name is omitted), with its site."""
    for gate in policy.gates.values():
        for condition in gate.conditions:
            assert gate.layer is not None
            site = Site(gate.layer, gate.point)
            if condition.feature is not None:
                yield condition.dictionary, site
            if condition.probe is not None and condition.probe.feature is not None:
                yield condition.probe.dictionary, site
    for edit in policy.interventions:
        if isinstance(edit, FeatureScale | FeatureClamp):
            yield edit.selector.dictionary, Site(edit.selector.layer, edit.selector.point)
        elif isinstance(edit, SteeringVector | DirectionAblation) and edit.vector.feature is not None:
            for layer in edit.selector.all_layers:
                yield edit.vector.dictionary, Site(layer, edit.selector.point)
