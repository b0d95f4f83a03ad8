"""The input of a trace: token ids of prompts, text and openings, with the model's own continuations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from discovery.data.sources import Kind, Source, read_prompts, read_text
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel

BATCH_TOKENS = 4096
"""The most tokens in a forward pass, including padding."""
WRITING_TOKENS = 16_384
"""The same for generation: each step reads all weights, so wide batches cost little more."""

Follow = Literal["", "answer", "text"]


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one sequence, their source, and what the model should add to them."""

    ids: tuple[int, ...]
    kind: Kind
    follow: Follow = ""
    """``answer``: the model's greedy answer; ``text``: sampled text."""


def build_sequences(
    model: FrozenModel, sources: Iterable[Source], context: int, answer_tokens: int, written_tokens: int
) -> list[TokenSequence]:
    """All token sequences of the sources, in order."""
    found: list[TokenSequence] = []
    for source in sources:
        if source.kind == "prompts":
            for prompt in read_prompts(source):
                ids = model.chat_ids(prompt, context - answer_tokens)
                found.append(TokenSequence(tuple(ids), "prompts", "answer" if answer_tokens else ""))
        elif source.kind == "openings":
            if written_tokens < 1:
                raise DiscoveryError(
                    f"{source.path}: holds openings, but written_tokens = 0; give the length of the "
                    "texts that the model writes from them (--written-tokens)"
                )
            openings = [model.text_ids(line)[: context - written_tokens] for line in read_prompts(source)]
            for _ in range(source.times):
                found.extend(TokenSequence(tuple(ids), "openings", "text") for ids in openings)
        else:
            ids = model.text_ids(read_text(source))
            pieces = (ids[i : i + context] for i in range(0, len(ids), context))
            found.extend(TokenSequence(tuple(piece), "text") for piece in pieces if len(piece) >= 8)
    if not found:
        raise DiscoveryError("the data has no sequence of 8 tokens or more; add prompts or text")
    return found


def batches(
    sequences: Sequence[list[int]], most: int = BATCH_TOKENS, room: int = 0
) -> Iterable[list[tuple[int, list[int]]]]:
    """(index, ids) of sequences in batches of at most ``most`` padded tokens, shortest first.

    ``room`` tokens are added to each sequence's length, for its continuation.
    """
    batch: list[tuple[int, list[int]]] = []
    for item in sorted(enumerate(sequences), key=lambda entry: len(entry[1])):
        if batch and (len(batch) + 1) * (len(item[1]) + room) > most:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def continued(
    model: FrozenModel, sequences: Sequence[TokenSequence], answer_tokens: int, written_tokens: int, seed: int
) -> list[list[int]]:
    """The ids of each sequence, followed by the model's answer or text if the sequence asks for one.

    Deterministic: the samples depend only on ``seed`` and the sequences.
    """
    full = [list(s.ids) for s in sequences]
    for follow, most in (("answer", answer_tokens), ("text", written_tokens)):
        asked = [index for index, s in enumerate(sequences) if s.follow == follow]
        for number, batch in enumerate(batches([full[index] for index in asked], WRITING_TOKENS, most)):
            chance = seed * 1009 + number if follow == "text" else None
            added = model.answers([ids for _, ids in batch], most, sample_seed=chance)
            for (place, _), ids in zip(batch, added, strict=True):
                full[asked[place]] += ids
    return full
