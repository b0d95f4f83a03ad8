"""CS of a Risk Card, read from the circuit file that the policy was proposed from."""

import math
import re
from pathlib import Path

from discovery.data.sources import sha256_of_file
from discovery.errors import DiscoveryError
from interpretops.circuit import Stability, load_circuit
from interpretops.plan import ModelSpec
from interpretops.policy import Policy
from interpretops.riskcard.card import CircuitReference, Interval, Measure, Source
from interpretops.riskcard.intervals import CONFIDENCE
from interpretops.riskcard.measures import absent

CIRCUITS_FOLDER = "circuits"
NO_ORIGIN = "the policy was not made from a circuit: its meta.origin names none"


def circuit_of(
    policy: Policy, model: ModelSpec, given: Path | None, artifacts: Path, store: Path | None = None
) -> tuple[CircuitReference, Measure, str | None]:
    """The circuit that a policy names, its CS, and a note.

    given  the file; None looks for it in ``circuits`` of the model's folder of artifacts, and in ``store``,
           the folder of circuits by id

    CS is the mean pairwise Jaccard similarity of the edges of n circuits; the file holds its bootstrap
    interval. Where it does not, CS is a U-statistic of degree 2 of values in [0, 1] with the interval of
    Hoeffding (1963, section 5b), +- sqrt(ln(2 / 0.05) / (2 floor(n / 2))).

    Raises `DiscoveryError` for a file that is not the one that the policy names, or is of another model.
    """
    origin = policy.meta.origin
    if origin is None:
        if given is not None:
            raise DiscoveryError(
                f"--circuit = {given}, but {policy.meta.id} was not made from a circuit: its meta.origin "
                "names none; leave --circuit out"
            )
        return CircuitReference(absent=NO_ORIGIN), absent(NO_ORIGIN), None
    named = CircuitReference(name=origin.circuit, sha256=origin.sha256, id=origin.id)
    places = [given] if given else [artifacts / model.name / CIRCUITS_FOLDER / Path(origin.circuit).name]
    if given is None and store is not None and origin.id is not None:
        places.append(store / f"{origin.id}.json")
    hashes = {path: sha256_of_file(path) for path in places if path.is_file()}
    path = next((path for path, found in hashes.items() if found == origin.sha256), None)
    if path is not None:
        return named, *_stability(path, model)
    if given is not None:
        raise DiscoveryError(
            f"--circuit = {given}: is not the circuit that {policy.meta.id} was made from (sha256 "
            f"{hashes.get(given, 'none')[:12]}, but meta.origin.sha256 = {origin.sha256[:12]})"
        )
    why = "was changed since the policy was made from it" if hashes else "is not among the artifacts"
    return named, absent(f"the circuit {origin.circuit} {why}; give --circuit FILE"), None


def _stability(path: Path, model: ModelSpec) -> tuple[Measure, str]:
    circuit = load_circuit(path)
    if circuit.fingerprint != model.fingerprint:
        raise DiscoveryError(
            f"{path}: is a circuit of {circuit.model} (fingerprint {circuit.fingerprint[:12]}), but the "
            f"policy is measured on a model with {model.fingerprint[:12]}; search that model"
        )
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:64]
    data = (Source(name=name, sha256=sha256_of_file(path), n=len(circuit.nodes)),)
    found = circuit.stability
    if found.circuits < 2:
        stability = absent(f"{path.name} compares fewer than two circuits")
    else:
        stability = Measure(
            value=found.edge_jaccard,
            n=found.circuits,
            interval=_interval(found),
            seeds=circuit.seeds,
            data=data,
        )
    kept = ", ".join(
        f"{item.faithfulness:.2f} under {item.ablation} ablation" for item in circuit.faithfulness
    )
    note = (
        f"Circuit {path.name}: CS by chance {found.edge_chance:.3f}; of its nodes {found.node_jaccard:.2f} "
        f"(by chance {found.node_chance:.3f}); faithfulness {kept or 'not measured'}."
    )
    return stability, note


def _interval(found: Stability) -> Interval:
    value = found.edge_jaccard
    if found.edge_interval is not None:
        low, high = found.edge_interval
        return Interval(low=min(low, value), high=max(high, value), method="bootstrap")
    margin = math.sqrt(math.log(2 / (1 - CONFIDENCE)) / (2 * (found.circuits // 2)))
    return Interval(low=max(0.0, value - margin), high=min(1.0, value + margin), method="hoeffding")
