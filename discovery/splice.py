"""What a dictionary costs the model: its reconstruction spliced into the residual stream of held-out text.

Attention sinks (tokens above the norm bound) are neither replaced nor counted.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from discovery.frozen_model import FrozenModel

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations [N, D] in float32 to feature activations [N, F] and reconstruction [N, D]."""

ROWS = 8


@dataclass(frozen=True)
class SpliceMetrics:
    """Measured on the tokens that are not sinks and whose next token is known."""

    tokens: int
    ce_model: float
    """Cross-entropy per token of the untouched model, in nats."""
    ce_spliced: float
    ce_mean_ablated: float
    """The same with every activation replaced by the mean: what losing the layer would cost."""
    delta_ce: float
    ce_recovered: float | None
    """1 for a perfect dictionary, 0 for one no better than the mean; None where the mean costs nothing."""
    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean number of active features."""
    dead_share: float
    """Share of features that fired on none of these tokens."""

    def record(self) -> dict[str, float | None]:
        return {k: None if v is None else round(float(v), 6) for k, v in asdict(self).items()}


@torch.no_grad()
def splice_metrics(
    model: FrozenModel, layer: int, max_norm: float, reconstruct: Reconstruct, tokens: Tensor, mask: Tensor
) -> SpliceMetrics:
    """Measure a dictionary on token ids and mask [B, T]."""
    fired: Tensor | None = None
    squares = errors = active = torch.zeros((), dtype=torch.float64)
    mean = _mean(model, layer, max_norm, tokens, mask)
    losses = {"model": 0.0, "spliced": 0.0, "mean": 0.0}
    count = 0
    seen = 0
    for start in range(0, len(tokens), ROWS):
        ids = tokens[start : start + ROWS].to(model.device)
        live = mask[start : start + ROWS].to(model.device)
        counted: Tensor | None = None

        def splice(x: Tensor, live: Tensor = live) -> Tensor:
            nonlocal counted, fired, squares, errors, active, seen
            counted = live.bool() & (x.float().norm(dim=-1) <= max_norm)
            flat = x[counted].float()
            features, rebuilt = reconstruct(flat)
            fired = (features != 0).any(0) if fired is None else fired | (features != 0).any(0)
            active = active + (features != 0).sum().double()
            squares = squares + (flat - mean).double().square().sum()
            errors = errors + (flat - rebuilt).double().square().sum()
            seen += len(flat)
            edited = x.clone()
            edited[counted] = rebuilt.to(x.dtype)
            return edited

        def ablate(x: Tensor, live: Tensor = live) -> Tensor:
            edited = x.clone()
            edited[live.bool() & (x.float().norm(dim=-1) <= max_norm)] = mean.to(x.dtype)
            return edited

        logits = {}
        for name, edits in (("model", {}), ("spliced", {layer: splice}), ("mean", {layer: ablate})):
            with model.edited(edits):
                logits[name] = model.network(input_ids=ids, attention_mask=live, use_cache=False).logits
        assert counted is not None
        target = ids[:, 1:]
        which = counted[:, :-1] & live[:, 1:].bool()
        count += int(which.sum())
        for name, values in logits.items():
            picked = values[:, :-1][which].float()
            losses[name] += float(cross_entropy(picked, target[which], reduction="sum"))
    ce = {name: total / max(count, 1) for name, total in losses.items()}
    lost = ce["mean"] - ce["model"]
    assert fired is not None
    return SpliceMetrics(
        tokens=count,
        ce_model=ce["model"],
        ce_spliced=ce["spliced"],
        ce_mean_ablated=ce["mean"],
        delta_ce=ce["spliced"] - ce["model"],
        ce_recovered=(ce["mean"] - ce["spliced"]) / lost if lost > 0 else None,
        fvu=float(errors / squares.clamp(min=1e-12)),
        l0=float(active) / max(seen, 1),
        dead_share=float((~fired).float().mean()),
    )


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
