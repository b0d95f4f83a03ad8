"""The DiffMean direction: how the mean last-token activations of two sets of prompts differ."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from discovery.frozen_model import FrozenModel
from discovery.jobs.progress import meter
from interpretops.plan import Array

BATCH = 8
CONTEXT = 512
MOST_PROMPTS = 128


def diffmean(
    folder: Path, towards: Sequence[str], away: Sequence[str], name: str, *, chat: bool = True
) -> Callable[[int], tuple[Array, str]]:
    """A function of the layer: mean over ``towards`` minus mean over ``away``, as measured and unscaled.

    towards, away  prompts; the first 128 of each are read
    name           what the contrast is called in the note
    """
    towards, away = towards[:MOST_PROMPTS], away[:MOST_PROMPTS]

    def at(layer: int) -> tuple[Array, str]:
        model = FrozenModel(folder)
        model.check_layers([layer])
        means = []
        with meter("baselines: DiffMean", len(towards) + len(away), "prompts") as progress:
            for prompts in (towards, away):
                total = torch.zeros(model.spec.hidden_size, dtype=torch.float64)
                for start in range(0, len(prompts), BATCH):
                    batch = prompts[start : start + BATCH]
                    ids = [
                        model.chat_ids(text, CONTEXT) if chat else model.text_ids(text)[:CONTEXT]
                        for text in batch
                    ]
                    tokens, mask = model.pad(ids)
                    found = model.residuals(tokens, mask, [layer])[layer].cpu()
                    last = mask.sum(1).cpu() - 1
                    total += found[torch.arange(len(batch)), last].double().sum(0)
                    progress.advance(len(batch))
                means.append(total / len(prompts))
        how = f"mean last-token activation of {len(towards)} prompts less that of {len(away)} ({name})"
        vector: Array = (means[0] - means[1]).numpy().astype(np.float32)
        return vector, how

    return at
