"""The dictionary that a proposal takes its features from."""

from collections.abc import Collection

from discovery.errors import DiscoveryError
from interpretops.artifacts import Artifacts
from interpretops.artifacts.dictionary import Dictionary
from interpretops.errors import DictionaryError
from interpretops.plan import ModelSpec
from interpretops.settings import Settings


def chosen_dictionary(
    settings: Settings, name: str | None, spec: ModelSpec, layers: Collection[int] | None = None
) -> Dictionary:
    """The named dictionary, or the model's only one (at ``layers``). Raises `DiscoveryError` otherwise."""
    root = settings.paths.artifacts
    artifacts = Artifacts(root, spec)
    if name is not None:
        try:
            return artifacts.named_dictionary(name)
        except DictionaryError as error:
            raise DiscoveryError(f"--dictionary {name}: {error}") from error
    ours = [m for m in artifacts.all_dictionaries.values() if m.model.fingerprint == spec.fingerprint]
    if layers is not None:
        ours = [m for m in ours if m.layer in layers]
    if len(ours) == 1:
        return artifacts.named_dictionary(ours[0].id)
    if ours:
        there = ", ".join(m.id for m in ours)
        raise DiscoveryError(f"--dictionary is not given, and {root} holds {there} for {spec.name}; name one")
    others = sorted({m.model.name for m in artifacts.all_dictionaries.values()}) or ["none"]
    raise DiscoveryError(
        f"{root}: holds no dictionary of {spec.name} (fingerprint {spec.fingerprint[:12]}; there are "
        f"dictionaries of {', '.join(others)}); train one with mechctl sae-train"
    )
