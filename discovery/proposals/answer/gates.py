"""Candidate gates: each is a set of conditions, and the prompts that open it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.frozen_model import norm_bound
from discovery.gates.gate_probe import Probe, auroc, fit_probe, threshold_at
from discovery.proposals.activation_readings import feature_auroc
from interpretops.artifacts.dictionary import Dictionary
from interpretops.steering.dictionary_features import DictionaryFeatures

GateKind = Literal["probe", "features", "always"]
RATES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3)
"""Shares of benign discovery prompts that a gate may open on; one threshold is tried for each."""
MOST_CONDITIONS = 24
CANDIDATES = 200

Ends = Mapping[str, Tensor]
"""Activations [N, D] at the prompt's end and the gate's layer, by side."""


@dataclass(frozen=True)
class GateChoice:
    """One gate: its entry in the policy, and which selection prompts open it."""

    rate: float
    """Share of benign discovery prompts that it was set to open on; 1 for a gate that is always open."""
    document: dict[str, Any]
    """The entry under the policy's ``gates``."""
    opens: dict[str, list[bool]]
    """By side: for each selection prompt, whether it opens the gate."""


def probe_gates(
    layer: int, discovery: Ends, selection: Ends, file: str, tensor: str
) -> tuple[list[GateChoice], Probe, float]:
    """Gates of a linear probe at all thresholds, the probe, and its AUROC on selection prompts."""
    negative = torch.cat([discovery["benign"], discovery["borderline"]])
    weights = torch.cat([torch.ones(len(x)) * w for x, w in _weighted(discovery)])
    probe = fit_probe(discovery["target"], negative, weights)
    readings = probe.read(negative)
    bound = round(norm_bound(torch.cat(list(discovery.values())).norm(dim=-1), 8.0), 1)
    choices = []
    for rate in RATES:
        cut = round(threshold_at(readings, rate), 4)
        condition = {
            "probe": {"file": file, "tensor": tensor},
            "bias": round(probe.bias, 6),
            "threshold": cut,
        }
        opens = {
            side: [bool(r > cut and n <= bound) for r, n in zip(probe.read(x), x.norm(dim=-1), strict=True)]
            for side, x in selection.items()
        }
        choices.append(GateChoice(rate, _document(layer, [condition], bound), opens))
    benign = torch.cat([selection["benign"], selection["borderline"]])
    return choices, probe, auroc(probe.read(selection["target"]), probe.read(benign))


def _weighted(discovery: Ends) -> Sequence[tuple[Tensor, float]]:
    return [(discovery["target"], 1.0), (discovery["benign"], 1.0), (discovery["borderline"], 2.0)]


def feature_gates(
    dictionary: Dictionary, discovery: Ends, selection: Ends, given: Sequence[int] | None = None
) -> list[GateChoice]:
    """Gates that open when any of a few features is active enough; one gate for each rate.

    Features are added greedily: each step takes the feature and threshold that gain most target prompts per
    additional benign prompt, as long as the benign prompts that open the gate stay within the rate.
    """
    layer = dictionary.manifest.layer
    features = DictionaryFeatures(dictionary.weights)
    target = features.encode(discovery["target"])
    benign = features.encode(torch.cat([discovery["benign"], discovery["borderline"]]))
    ids = list(given) if given is not None else _best(target, benign)
    if not ids:
        raise DiscoveryError(
            f"{dictionary.manifest.id}: no feature is more active at the end of target prompts; "
            "use a probe gate"
        )
    seen = {side: features.encode(x)[:, ids] for side, x in selection.items()}
    choices, last = [], None
    for rate in RATES:
        cuts = _greedy(target[:, ids], benign[:, ids], rate)
        if not cuts or cuts == last:
            continue
        last = cuts
        conditions = [
            {"feature": ids[place], "dictionary": dictionary.manifest.id, "threshold": cut}
            for place, cut in cuts.items()
        ]
        opens = {side: _fires(x, cuts).tolist() for side, x in seen.items()}
        choices.append(GateChoice(rate, _document(layer, conditions, None), opens))
    if not choices:
        raise DiscoveryError(
            f"{dictionary.manifest.id}: no threshold of its features separates target from benign prompts; "
            "use a probe gate"
        )
    return choices


def _best(target: Tensor, benign: Tensor) -> list[int]:
    scores = feature_auroc(target, benign)
    order = scores.argsort(descending=True)[:CANDIDATES].tolist()
    return [int(f) for f in order if float(scores[f]) > 0.5 and float(target[:, f].max()) > 0]


def _greedy(target: Tensor, benign: Tensor, rate: float) -> dict[int, float]:
    """Thresholds by column."""
    allowed = int(rate * len(benign))
    hit, wrong = (torch.zeros(len(x), dtype=torch.bool) for x in (target, benign))
    cuts: dict[int, float] = {}
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9])
    options: list[tuple[int, float, Tensor, Tensor]] = []
    for column in range(target.shape[1]):
        active = target[:, column][target[:, column] > 0]
        levels = {0.0, *(round(float(v), 2) for v in active.quantile(quantiles)), *_above(benign[:, column])}
        options += [(column, cut, target[:, column] > cut, benign[:, column] > cut) for cut in sorted(levels)]
    while len(cuts) < MOST_CONDITIONS:
        best: tuple[float, int, float, Tensor, Tensor] | None = None
        for column, cut, fires, errs in options:
            if column in cuts:
                continue
            gain, cost = int((fires & ~hit).sum()), int((errs & ~wrong).sum())
            if gain < 1 or int(wrong.sum()) + cost > allowed:
                continue
            value = gain / len(target) / (cost / len(benign) + 0.5 / len(benign))
            if best is None or value > best[0]:
                best = (value, column, cut, fires, errs)
        if best is None:
            break
        _, column, cut, fires, errs = best
        cuts[column] = cut
        hit, wrong = hit | fires, wrong | errs
    return cuts


def _above(benign: Tensor) -> list[float]:
    """Thresholds that leave the most active benign prompts, few or none, above them."""
    highest = benign[benign > 0].sort(descending=True).values[:4].tolist()
    return [round(value + 0.01, 2) for value in highest]


def _fires(active: Tensor, cuts: Mapping[int, float]) -> Tensor:
    fired = torch.zeros(len(active), dtype=torch.bool)
    for column, cut in cuts.items():
        fired |= active[:, column] > cut
    return fired


def _document(layer: int, conditions: list[dict[str, Any]], bound: float | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "layer": layer,
        "point": "resid_post",
        "conditions": conditions,
        "scope": "prompt_end",
        "latched": True,
    }
    return entry if bound is None else entry | {"max_norm": bound}
