"""Reads what a proposal starts from besides its contrast: a list of features, or a circuit."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovery.data.sources import sha256_of_file
from discovery.errors import DiscoveryError
from interpretops.circuit import Circuit, load_circuit
from interpretops.files.strict_yaml import read_yaml
from interpretops.plan import ModelSpec

_FEATURE = re.compile(r"f(?P<layer>\d+)\.(?P<feature>\d+)")
LAYERS_OF_CIRCUIT = 3


@dataclass(frozen=True)
class Origin:
    """Where to act, if something other than the contrast determines it."""

    layers: tuple[int, ...] | None = None
    """Layers of the edit; None leaves the choice to the settings."""
    features: dict[int, tuple[int, ...]] | None = None
    """Features by layer; key -1 is for features listed without a layer."""
    dictionary: str | None = None
    """The dictionary of a circuit's features."""
    record: tuple[dict[str, Any], ...] = ()
    """Name and sha256 of the file."""
    is_circuit: bool = False
    circuit_id: str | None = None

    @property
    def of_policy(self) -> dict[str, Any]:
        """The part of a policy's `meta` that names the circuit, if there is one."""
        if not self.is_circuit:
            return {}
        (file,) = self.record
        named = {"circuit": file["path"], "sha256": file["sha256"]}
        return {"origin": named | ({} if self.circuit_id is None else {"id": self.circuit_id})}

    def features_at(self, layer: int) -> tuple[int, ...] | None:
        """The features at a layer, or None if the contrast is to pick them."""
        if self.features is None:
            return None
        return tuple(self.features.get(layer, ())) + tuple(self.features.get(-1, ()))


def from_features(text: str) -> Origin:
    """Feature ids: as ``12,40``, or a file (txt, json, yaml) that lists them."""
    if re.fullmatch(r"\d+(\s*,\s*\d+)*", text.strip()):
        return Origin(features={-1: tuple(dict.fromkeys(int(part) for part in text.split(",")))})
    path = Path(text)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DiscoveryError(
            f"--features = {text!r} is neither ids separated by commas nor a readable file ({reason})"
        ) from error
    if path.suffix in (".yaml", ".yml"):
        found: Any = read_yaml(path, DiscoveryError).data
    elif path.suffix == ".json":
        try:
            found = json.loads(content)
        except ValueError as error:
            raise DiscoveryError(f"{path}: is not JSON ({error})") from error
    else:
        found = [int(word) if word.isdigit() else word for word in content.replace(",", " ").split()]
    ids = found.get("features") if isinstance(found, dict) else found
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise DiscoveryError(
            f"{path}: must list feature ids, such as [12, 40], or hold them under 'features'"
        )
    record = {"path": path.name, "sha256": sha256_of_file(path)}
    return Origin(features={-1: tuple(dict.fromkeys(ids))}, record=(record,))


def from_circuit(path: Path, spec: ModelSpec) -> Origin:
    """The layers whose nodes contribute most to a circuit, and any features that it names."""
    circuit = load_circuit(path)
    if circuit.fingerprint != spec.fingerprint:
        raise DiscoveryError(
            f"{path}: belongs to {circuit.model} (fingerprint {circuit.fingerprint[:12]}), not of "
            f"{spec.name} (fingerprint {spec.fingerprint[:12]}); search it again"
        )
    features: dict[int, tuple[int, ...]] = {}
    dictionaries: set[str | None] = set()
    for node in circuit.nodes:
        if named := _FEATURE.fullmatch(node.id):
            layer = int(named["layer"])
            features[layer] = (*features.get(layer, ()), int(named["feature"]))
            dictionaries.add(getattr(node, "dictionary", None))
    weights = _layer_weights(circuit)
    if not weights:
        raise DiscoveryError(
            f"{path}: names no head, MLP or feature, so it gives no layer to edit; use another circuit"
        )
    layers = tuple(sorted(sorted(weights, key=lambda layer: -weights[layer])[:LAYERS_OF_CIRCUIT]))
    record = {"path": path.name, "sha256": sha256_of_file(path)}
    dictionary = dictionaries.pop() if len(dictionaries) == 1 else None
    return Origin(layers, features or None, dictionary, (record,), is_circuit=True, circuit_id=circuit.id)


def _layer_weights(circuit: Circuit) -> dict[int, float]:
    """The sum of each layer's contributions: causal if measured, otherwise by attribution."""
    weights: dict[int, float] = {}
    for node in (*circuit.components(), *circuit.features()):
        if node.layer is not None:
            size = abs(node.score) if node.ccs is None else abs(node.ccs)
            weights[node.layer] = weights.get(node.layer, 0.0) + size
    return weights
