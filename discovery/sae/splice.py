"""Measures a dictionary's cost to the model: splices its reconstruction into the residual stream.

Attention sinks (tokens above the norm bound) are neither replaced nor counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from discovery.frozen_model import FrozenModel

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations [N, D] in float32 to feature activations [N, F] and reconstruction [N, D]."""

ROWS = 8


@dataclass(frozen=True)
class SpliceMetrics:
    """Metrics over the tokens that are not sinks and whose next token is known."""

    tokens: int
    ce_model: float
    """Cross-entropy per token of the unmodified model, in nats."""
    ce_spliced: float
    ce_mean_ablated: float
    """The same with every activation replaced by the mean: the cost of losing the layer."""
    delta_ce: float
    ce_recovered: float | None
    """1 for a perfect dictionary, 0 for one no better than the mean; None if the mean costs nothing."""
    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean number of active features."""
    dead_share: float
    """Share of features that never fired on these tokens."""

    def record(self) -> dict[str, float | None]:
        return {k: None if v is None else round(float(v), 6) for k, v in asdict(self).items()}


@dataclass
class _Tally:
    """Sums over the tokens of one part; the sums of several parts add up."""

    fired: Tensor
    total: Tensor
    seen: int = 0
    squares: float = 0.0
    errors: float = 0.0
    active: float = 0.0
    count: int = 0
    loss: dict[str, float] = field(default_factory=lambda: {"model": 0.0, "spliced": 0.0, "mean": 0.0})

    def add_activations(self, x: Tensor, features: Tensor, rebuilt: Tensor) -> None:
        self.fired |= (features != 0).any(0)
        self.total += x.double().sum(0)
        self.seen += len(x)
        self.squares += float(x.double().square().sum())
        self.errors += float((x - rebuilt).double().square().sum())
        self.active += float((features != 0).sum())

    def add(self, other: "_Tally") -> None:
        self.fired |= other.fired
        self.total += other.total
        for name in ("seen", "squares", "errors", "active", "count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, loss in other.loss.items():
            self.loss[name] += loss

    def metrics(self) -> SpliceMetrics:
        ce = {name: total / max(self.count, 1) for name, total in self.loss.items()}
        variance = self.squares - float(self.total.square().sum()) / max(self.seen, 1)
        lost = ce["mean"] - ce["model"]
        return SpliceMetrics(
            tokens=self.count,
            ce_model=ce["model"],
            ce_spliced=ce["spliced"],
            ce_mean_ablated=ce["mean"],
            delta_ce=ce["spliced"] - ce["model"],
            ce_recovered=(ce["mean"] - ce["spliced"]) / lost if lost > 0 else None,
            fvu=self.errors / max(variance, 1e-12),
            l0=self.active / max(self.seen, 1),
            dead_share=float((~self.fired).float().mean()),
        )


def splice_metrics(
    model: FrozenModel, layer: int, max_norm: float, reconstruct: Reconstruct, tokens: Tensor, mask: Tensor
) -> SpliceMetrics:
    """Measure a dictionary on token ids and mask [B, T]."""
    return splice_by_part(model, layer, max_norm, reconstruct, tokens, mask, [""] * len(tokens))[0]


@torch.no_grad()
def splice_by_part(
    model: FrozenModel,
    layer: int,
    max_norm: float,
    reconstruct: Reconstruct,
    tokens: Tensor,
    mask: Tensor,
    parts: Sequence[str],
) -> tuple[SpliceMetrics, dict[str, SpliceMetrics]]:
    """Measure a dictionary on token ids and mask [B, T]: overall, and for each part (one name per row)."""
    mean = _mean(model, layer, max_norm, tokens, mask)
    features = reconstruct(mean[None])[0].shape[1]

    def tally() -> _Tally:
        fired = torch.zeros(features, dtype=torch.bool, device=model.device)
        return _Tally(fired, torch.zeros_like(mean, dtype=torch.float64))

    tallies = {part: tally() for part in dict.fromkeys(parts)}
    for part, into in tallies.items():
        rows = torch.tensor([row for row, name in enumerate(parts) if name == part])
        for some in torch.split(rows, ROWS):
            live = mask[some]
            longest = int(live.sum(1).max())
            ids, live = tokens[some, :longest].to(model.device), live[:, :longest].to(model.device)
            _measure(model, layer, max_norm, reconstruct, ids, live, mean, into)
    whole = tally()
    for into in tallies.values():
        whole.add(into)
    return whole.metrics(), {part: into.metrics() for part, into in tallies.items()}


def _measure(
    model: FrozenModel,
    layer: int,
    max_norm: float,
    reconstruct: Reconstruct,
    ids: Tensor,
    live: Tensor,
    mean: Tensor,
    into: _Tally,
) -> None:
    counted = live.bool()

    def splice(x: Tensor) -> Tensor:
        nonlocal counted
        counted = live.bool() & (x.float().norm(dim=-1) <= max_norm)
        flat = x[counted].float()
        features, rebuilt = reconstruct(flat)
        into.add_activations(flat, features, rebuilt)
        edited = x.clone()
        edited[counted] = rebuilt.to(x.dtype)
        return edited

    def ablate(x: Tensor) -> Tensor:
        edited = x.clone()
        edited[live.bool() & (x.float().norm(dim=-1) <= max_norm)] = mean.to(x.dtype)
        return edited

    logits = {}
    for name, edits in (("model", {}), ("spliced", {layer: splice}), ("mean", {layer: ablate})):
        with model.edited(edits):
            logits[name] = model.network(input_ids=ids, attention_mask=live, use_cache=False).logits
    target = ids[:, 1:]
    which = counted[:, :-1] & live[:, 1:].bool()
    into.count += int(which.sum())
    for name, values in logits.items():
        picked = values[:, :-1][which].float()
        into.loss[name] += float(cross_entropy(picked, target[which], reduction="sum"))


def _mean(model: FrozenModel, layer: int, max_norm: float, tokens: Tensor, mask: Tensor) -> Tensor:
    total = torch.zeros(model.spec.hidden_size, dtype=torch.float64, device=model.device)
    count = 0
    for start in range(0, len(tokens), ROWS):
        live = mask[start : start + ROWS].to(model.device)
        x = model.residuals(tokens[start : start + ROWS].to(model.device), live, [layer])[layer].float()
        flat = x[live.bool() & (x.norm(dim=-1) <= max_norm)]
        total += flat.double().sum(0)
        count += len(flat)
    return (total / max(count, 1)).float()
