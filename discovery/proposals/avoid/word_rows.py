"""Rows against words, without training: each detects that a word has begun and lowers its next logit.

For a suppressed token with unembedding ``u`` (through the final norm, less the mean), at a late layer:

    read    C⁻¹ (m - o)     m: mean state in which the word has begun, o and C: mean and covariance of others
            C⁻¹ u           for a token that is a word by itself: its logit, whitened
    cut     fires on the share `WORD_RATE` of other tokens
    write   -K⁻¹u / u·K⁻¹u  of all writes that lower this logit by one, the one that moves the others least;
                            K is the second moment of the unembeddings

A row's gain is set on the states in which the model is likeliest to say the word: there, the logit falls
by alpha nats. Shape letters: N tokens, D width, P suppressed tokens, V vocabulary.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discovery.data.trace import batches
from discovery.frozen_model import Edit, FrozenModel
from discovery.jobs.progress import Meter
from discovery.proposals.avoid.answer_trait import Sampled
from discovery.proposals.avoid.unwanted_words import SuppressedToken, Tokens

WORD_RATE = 0.003
"""Share of other tokens on which a row fires."""
CONTEXTS = 12
"""ProposalPaths in answers at which a beginning is put."""
CONTEXT_TOKENS = 24
LIKELIEST = 8
"""States that set a row's gain."""
RIDGE = {"states": 0.01, "logit": 0.1, "write": 0.001}
"""Shrinkage of a covariance to a multiple of the identity, relative to its mean variance."""
LEAST_EXCESS = 0.5
"""In standard deviations of other tokens: bounds the gain of a row that hardly fires."""


@dataclass(frozen=True, eq=False)
class WordStates:
    """Hidden states at which unwanted words have begun."""

    states: Mapping[int, Tensor]
    """[N, D] by layer"""
    piece: Tensor
    """[N] index of the suppressed token that would come next"""
    likely: Tensor
    """[N] its probability"""


@dataclass(frozen=True, eq=False)
class WordRows:
    """Rows of one layer, the likeliest words first: [P, D], [P], [P, D]."""

    read: Tensor
    bias: Tensor
    write: Tensor


def begun(
    samples: Sequence[Sampled], pieces: Sequence[SuppressedToken], seed: int
) -> list[tuple[int, Tokens]]:
    """(suppressed token's index, ids): beginnings of unwanted words at random places in answers."""
    chance = random.Random(seed)  # noqa: S311 (places, no secret)
    found = []
    for number, piece in enumerate(pieces):
        # A word of one token may begin anywhere, so more places are tried; the likeliest count.
        for before in piece.after:
            for _ in range(CONTEXTS if before else CONTEXTS * 8):
                sample = chance.choice(samples)
                end = len(sample.prompt) + chance.randint(0, len(sample.answer))
                found.append((number, (*sample.ids[max(0, end - CONTEXT_TOKENS) : end], *before)))
    return found


@torch.no_grad()
def word_states(
    model: FrozenModel,
    places: Sequence[tuple[int, Tokens]],
    pieces: Sequence[SuppressedToken],
    layers: Sequence[int],
    progress: Meter,
) -> WordStates:
    """The state at the end of each place, and how likely its suppressed token is there."""
    states = {layer: torch.zeros(len(places), model.spec.hidden_size) for layer in layers}
    likely = torch.zeros(len(places))
    numbers = torch.tensor([number for number, _ in places])
    tokens_of = torch.tensor([piece.token for piece in pieces])
    for batch in batches([list(ids) for _, ids in places]):
        tokens, mask = model.pad([ids for _, ids in batch])
        index = [place for place, _ in batch]
        ends = (torch.arange(len(batch)), (mask.sum(1) - 1).cpu())
        kept: dict[int, Tensor] = {}
        with model.edited({layer: _keeping(kept, layer) for layer in layers}):
            hidden = model.network.base_model(
                input_ids=tokens, attention_mask=mask, use_cache=False
            ).last_hidden_state[ends]
        logits = model.network.get_output_embeddings()(hidden).float().log_softmax(-1).cpu()
        likely[index] = logits[ends[0], tokens_of[numbers[index]]].exp()
        for layer, x in kept.items():
            states[layer][index] = x[ends].float().cpu()
        progress.advance(len(batch))
    return WordStates(states, numbers, likely)


def likeliest(found: WordStates, count: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``count`` suppressed tokens, the likeliest first."""
    means = [float(found.likely[found.piece == number].mean()) for number in range(count)]
    return sorted(range(count), key=lambda number: -means[number])[:most]


@torch.no_grad()
def word_rows(
    model: FrozenModel,
    layer: int,
    pieces: Sequence[SuppressedToken],
    order: Sequence[int],
    found: WordStates,
    others: Tensor,
) -> WordRows:
    """One row for each suppressed token in ``order``; ``others`` [N, D] are tokens not to be edited."""
    unembed = centred_unembedding(model)
    spread = torch.cov(others.T)
    by_states, by_logit = (_inverse(spread, RIDGE[name]) for name in ("states", "logit"))
    apart = _inverse(unembed.T @ unembed / len(unembed), RIDGE["write"])
    scale = float(others.square().mean(-1).sqrt().median())
    reads, biases, writes = [], [], []
    for number in order:
        piece, own = pieces[number], found.piece == number
        u, x = unembed[piece.token], found.states[layer][own]
        read = by_logit @ u if () in piece.after else by_states @ (x.mean(0) - others.mean(0))
        read = read / (others @ read).std()
        cut = torch.quantile((others @ read)[: 2**16], 1 - WORD_RATE)
        top = found.likely[own].argsort(descending=True)[:LIKELIEST]
        excess = (x[top] @ read - cut).median().clamp(min=LEAST_EXCESS)
        push = apart @ u
        reads.append(read)
        biases.append(-cut)
        writes.append(-push / (u @ push) * scale / excess)
    return WordRows(torch.stack(reads), torch.stack(biases), torch.stack(writes))


def centred_unembedding(model: FrozenModel) -> Tensor:
    """[V, D] unembedding through the final norm, less its mean over the vocabulary."""
    network: Any = model.network
    norm = getattr(network.base_model, "norm", getattr(network.base_model, "final_layer_norm", None))
    unembed: Tensor = network.get_output_embeddings().weight.detach().float().cpu()
    if norm is not None:
        unembed = unembed * norm.weight.detach().float().cpu()
    return unembed - unembed.mean(0)


def _inverse(covariance: Tensor, ridge: float) -> Tensor:
    mean = covariance.diagonal().mean()
    inverse: Tensor = torch.linalg.inv(covariance + ridge * mean * torch.eye(len(covariance)))
    return inverse


def _keeping(kept: dict[int, Tensor], layer: int) -> Edit:
    def edit(x: Tensor) -> Tensor:
        kept[layer] = x
        return x

    return edit
