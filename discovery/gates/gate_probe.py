"""Probes: a logistic regression on the last prompt token's activation, used as a policy's gate."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from discovery.data.trace import batches
from discovery.frozen_model import FrozenModel
from discovery.jobs.progress import Meter


@torch.no_grad()
def prompt_end_features(
    model: FrozenModel, prompts: Sequence[Sequence[int]], layers: Sequence[int], progress: Meter | None = None
) -> dict[int, Tensor]:
    """Residual stream [N, D] in float32 at the last token of each formatted prompt, after each layer."""
    found = {layer: torch.zeros(len(prompts), model.spec.hidden_size) for layer in layers}
    for batch in batches([list(ids) for ids in prompts]):
        tokens, mask = model.pad([ids for _, ids in batch])
        last = mask.sum(1) - 1
        rows = torch.arange(len(batch), device=tokens.device)
        places = [place for place, _ in batch]
        for layer, x in model.residuals(tokens, mask, layers).items():
            found[layer][places] = x[rows, last].float().cpu()
        if progress is not None:
            progress.advance(int(mask.sum()))
    return found


@dataclass(frozen=True, eq=False)
class Probe:
    """A direction in the residual stream: positive readings indicate the class."""

    direction: Tensor
    """[D], scaled so that readings of the training prompts have unit variance."""
    bias: float

    def read(self, x: Tensor) -> Tensor:
        """Readings [N] of activations [N, D]."""
        return x @ self.direction + self.bias


def fit_probe(positive: Tensor, negative: Tensor, weights: Tensor | None = None, l2: float = 30.0) -> Probe:
    """Logistic regression on standardised activations, both classes of equal total weight.

    ``weights`` [P + N] are relative weights within the classes. L-BFGS in float64 makes the result
    reproducible.
    """
    x = torch.cat([positive, negative]).double()
    sign = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))]).double()
    weight = torch.ones(len(x)).double() if weights is None else weights.double().clone()
    for side in (1, -1):
        weight[sign == side] *= len(x) / 2 / weight[sign == side].sum()
    mean, spread = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / spread
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        readings = z @ w + b
        value = (weight * torch.nn.functional.softplus(-sign * readings)).sum() + l2 / 2 * w.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        unit = 1 / (z @ w).std()
        direction = w / spread * unit
        return Probe(direction.float(), float(b * unit - mean @ direction))


def threshold_at(readings: Tensor, rate: float) -> float:
    """The threshold that the given share of readings exceeds."""
    return float(torch.quantile(readings.float(), 1 - rate))


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive reading exceeds a negative one; ties count half."""
    both = torch.cat([negative, positive]).double()
    order = both.argsort()
    ranks = torch.empty_like(both)
    ranks[order] = torch.arange(1, len(both) + 1, dtype=torch.float64)
    values, counts = torch.unique(both, return_counts=True)
    for value in values[counts > 1]:
        ranks[both == value] = ranks[both == value].mean()
    n, p = len(negative), len(positive)
    return float((ranks[n:].sum() - p * (p + 1) / 2) / (n * p))
