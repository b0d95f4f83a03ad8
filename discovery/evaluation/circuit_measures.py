"""CCS and CS of a Risk Card, read from a circuit file."""

import math
import re
from pathlib import Path

from discovery.data.sources import sha256_of_file
from discovery.errors import DiscoveryError
from interpretops.circuit import Stability, load_circuit
from interpretops.riskcard.card import Interval, Measure, Measures, Source
from interpretops.riskcard.intervals import CONFIDENCE, bootstrap_mean
from interpretops.riskcard.measures import absent


def circuit_measures(path: Path, fingerprint: str, seed: int) -> tuple[Measures, str]:
    """CCS and CS of the circuit in ``path``, and a note; a circuit of another model is refused.

    CCS is the mean over the circuit's heads and MLPs of each one's Causal Contribution Score; units are drawn
    anew for its interval. CS is the mean pairwise Jaccard similarity of the edges of n circuits; the file
    holds its bootstrap interval. Where it does not, CS is a U-statistic of degree 2 of values in [0, 1] with
    the interval of Hoeffding (1963, section 5b), +- sqrt(ln(2 / 0.05) / (2 floor(n / 2))).
    """
    circuit = load_circuit(path)
    if circuit.fingerprint != fingerprint:
        raise DiscoveryError(
            f"{path}: is a circuit of {circuit.model} (fingerprint {circuit.fingerprint[:12]}), but the "
            f"policy is measured on a model with {fingerprint[:12]}; search that model"
        )
    units = [node.ccs for node in circuit.components() if node.ccs is not None]
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:64]
    data = (Source(name=name, sha256=sha256_of_file(path), n=len(circuit.nodes)),)
    if len(units) < 2:
        contribution = absent(f"{path.name} gives fewer than two units a contribution")
    else:
        value, (low, high) = sum(units) / len(units), bootstrap_mean(units, seed=seed)
        interval = Interval(low=min(low, value), high=max(high, value), method="bootstrap")
        contribution = Measure(value=value, n=len(units), interval=interval, seeds=(seed,), data=data)
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
    return {"causal_contribution": contribution, "circuit_stability": stability}, note


def _interval(found: Stability) -> Interval:
    value = found.edge_jaccard
    if found.edge_interval is not None:
        low, high = found.edge_interval
        return Interval(low=min(low, value), high=max(high, value), method="bootstrap")
    margin = math.sqrt(math.log(2 / (1 - CONFIDENCE)) / (2 * (found.circuits // 2)))
    return Interval(low=max(0.0, value - margin), high=min(1.0, value + margin), method="hoeffding")
