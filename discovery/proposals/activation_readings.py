"""Reads the model's activations for both sides of a contrast: at the prompt's end, and along its answers.

Shape letters: N prompts or answers, T tokens, D width, F features.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from discovery.data.trace import batches
from discovery.frozen_model import FrozenModel
from discovery.jobs.progress import Meter
from interpretops.artifacts.dictionary import Dictionary
from interpretops.steering.dictionary_features import DictionaryFeatures


@torch.no_grad()
def answer_means(
    model: FrozenModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    layers: Sequence[int],
    progress: Meter | None = None,
) -> dict[int, Tensor]:
    """[N, D] float32 per layer: the mean activation of the tokens from which an answer was predicted.

    These are the last token of the prompt and all of the answer but its last: those that an edit acts on
    behind a gate at the prompt's end.
    """
    found = {layer: torch.zeros(len(prompts), model.spec.hidden_size) for layer in layers}
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    for batch in batches(whole):
        tokens, mask = model.pad([ids for _, ids in batch])
        residuals = model.residuals(tokens, mask, layers)
        for row, (place, ids) in enumerate(batch):
            span = slice(len(prompts[place]) - 1, max(len(ids) - 1, len(prompts[place])))
            for layer in layers:
                found[layer][place] = residuals[layer][row, span].float().mean(0).cpu()
        if progress is not None:
            progress.advance(len(batch))
    return found


@torch.no_grad()
def answer_features(
    model: FrozenModel,
    dictionary: Dictionary,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    progress: Meter | None = None,
) -> Tensor:
    """[N, F] mean activation of every feature over the tokens from which an answer was predicted.

    Attention sinks are left out, as in the engine.
    """
    layer, bound = dictionary.manifest.layer, dictionary.max_norm
    features = DictionaryFeatures(dictionary.weights)
    found = torch.zeros(len(prompts), dictionary.width)
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    for batch in batches(whole):
        tokens, mask = model.pad([ids for _, ids in batch])
        x = model.residuals(tokens, mask, [layer])[layer]
        for row, (place, ids) in enumerate(batch):
            span = slice(len(prompts[place]) - 1, max(len(ids) - 1, len(prompts[place])))
            own = x[row, span].float().cpu()
            active = features.encode(own)[own.norm(dim=-1) <= bound]
            if len(active):
                found[place] = active.mean(0)
        if progress is not None:
            progress.advance(len(batch))
    return found


def feature_auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """[F] AUROC: the chance that a positive value [P, F] exceeds a negative one [N, F]; ties count half."""
    both = torch.cat([positive, negative]).T.contiguous()
    order = both.sort(dim=1).values
    ranks = torch.searchsorted(order, both) + torch.searchsorted(order, both, right=True)
    p, n = len(positive), len(negative)
    above = (ranks[:, :p].double() + 1).sum(1) / 2 - p * (p + 1) / 2
    return (above / (p * n)).float()


def sides(tensors: Mapping[str, Tensor], layer: int, *names: str) -> Tensor:
    """Activations [N, D] of the named sides at a layer, from tensors named ``<side>/<layer>``."""
    return torch.cat([tensors[f"{name}/{layer}"] for name in names if f"{name}/{layer}" in tensors])


def as_numpy(x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A float32 array for a vector file."""
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = x.detach().numpy().astype(np.float32)
    return array
