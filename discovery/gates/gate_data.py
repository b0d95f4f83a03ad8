"""The prompts of `fit-gate`, split into training, selection and test without overlap."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from discovery.data.buried_requests import buried
from discovery.data.coded_requests import decoded, followed
from discovery.data.prompt_variants import Surroundings, conversation_ids, messages_of, words_of
from discovery.data.rewritten_requests import rewritten
from discovery.data.sources import (
    DataList,
    Prompt,
    Source,
    read_conversations,
    read_prompts,
    read_text,
    refuse_noncommercial,
)
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel

CONTEXT = 1024

Groups = dict[str, list[Prompt]]


PIECE_CHARACTERS = 500
REWRITTEN = 0.25
"""Share of the wrapped requests that are rewritten, see `rewritten`."""
SPECIAL = ("wrappers", "select_wrappers", "system_prompts", "earlier_turns", "answer_openings", "passages")


@dataclass(frozen=True)
class GateData:
    """Prompts by group; a group's name says which side it is on."""

    train: Groups
    select: Groups
    test: Groups
    surroundings: Surroundings = field(default_factory=Surroundings)
    plain_text: tuple[str, ...] = ()
    """Pieces of benign plain text."""
    openings: tuple[str, ...] = ()
    """Openings from which the model writes benign texts."""

    def sides(self, groups: Groups) -> tuple[list[Prompt], list[Prompt]]:
        """(harmful, benign) prompts of these groups, in order."""
        harmful = [prompt for name, prompts in groups.items() if is_harmful(name) for prompt in prompts]
        benign = [prompt for name, prompts in groups.items() if not is_harmful(name) for prompt in prompts]
        return harmful, benign


def is_harmful(group: str) -> bool:
    """Whether a group's prompts should be refused."""
    return "harmful" in group or "jailbreak" in group


def load_gate_data(data: DataList, seed: int) -> GateData:
    """Read all prompts. Raises `DiscoveryError` if a side is empty.

    Groups are named ``harmful…``, ``benign…``, ``select_…`` and ``test_…``. ``wrappers`` and
    ``select_wrappers`` hold templates with ``{request}`` for sources with ``wrap: true``; ``system_prompts``
    and ``earlier_turns`` may precede a training prompt, ``answer_openings`` may follow it. ``passages`` holds
    ordinary text for sources with ``bury``. Benign text sources give plain text; benign openings give text
    that the model writes.
    """
    special = {name: _special(data, name) for name in SPECIAL}
    for name in ("wrappers", "select_wrappers"):
        for text in special[name]:
            if "{request}" not in text:
                raise DiscoveryError(f"{name}: {text!r} has no {{request}} to put a prompt into")
    chance = random.Random(seed)  # noqa: S311 (sampling, no secret)
    groups: Groups = {}
    pieces: list[str] = []
    openings: list[str] = []
    for name, sources in data.groups.items():
        if name in SPECIAL:
            continue
        if not name.startswith("test_"):
            refuse_noncommercial(sources, purpose="a learned edit")
        wrappers = special["select_wrappers" if name.startswith("select_") else "wrappers"]
        prompts: list[Prompt] = []
        for source in sources:
            if source.kind == "text":
                text = read_text(source)
                pieces += [text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS)]
                continue
            if source.kind == "openings":
                openings += read_prompts(source) * source.times
                continue
            prompts += _rendered(name, source, wrappers, special["passages"], chance)
        if prompts:
            groups[name] = list(dict.fromkeys(prompts))
    test = {name: prompts for name, prompts in groups.items() if name.startswith("test_")}
    select = {name: prompts for name, prompts in groups.items() if name.startswith("select_")}
    train = {name: prompts for name, prompts in groups.items() if name not in test and name not in select}
    select = _without(select, test)
    train = _without(_without(train, test), select)
    surroundings = Surroundings(
        system_prompts=tuple(special["system_prompts"]),
        earlier_turns=tuple(special["earlier_turns"]),
        answer_openings=tuple(special["answer_openings"]),
    )
    surroundings.check()
    found_data = GateData(train, select, test, surroundings, tuple(pieces), tuple(openings))
    for stage, chosen in (("training", train), ("select_", select)):
        if not all(found_data.sides(chosen)):
            missing = "harmful" if not found_data.sides(chosen)[0] else "benign"
            raise DiscoveryError(f"the {stage} groups hold no {missing} prompts; a gate needs both sides")
    return found_data


def _special(data: DataList, name: str) -> list[str]:
    return [text for source in data.groups.get(name, ()) for text in read_prompts(source)]


def _rendered(
    group: str, source: Source, wrappers: list[str], passages: list[str], chance: random.Random
) -> list[Prompt]:
    """The prompts of a source, in the templates, wrappers and passages that it asks for."""
    if source.turns:
        return read_conversations(source)
    found = read_prompts(source)
    if source.bury is not None:
        if not passages:
            raise DiscoveryError(f"{group}: {source.path.name} has bury, but there are no passages")
        return [buried(prompt, passages, chance.randint(*source.bury), chance) for prompt in found]
    if source.templates:
        templates = read_prompts(replace(source, name=source.templates, part=(0.0, 1.0), limit=None))
        found = [
            template.replace("{vp}", request).replace("{Vp}", request[:1].upper() + request[1:])
            for request in found
            for template in chance.sample(templates, min(source.each, len(templates)))
        ]
    if source.code:
        put = followed if source.code == "follow" else decoded
        return [put(prompt, chance) for prompt in found]
    if not source.wrap:
        return list(found)
    if not wrappers:
        raise DiscoveryError(f"{group}: {source.path.name} has wrap: true, but there are no wrappers")
    each = 1 if source.templates else source.each
    return [
        wrapper.replace("{request}", rewritten(prompt, chance) if chance.random() < REWRITTEN else prompt)
        for prompt in found
        for wrapper in chance.sample(wrappers, min(each, len(wrappers)))
    ]


NEAR = 0.75
"""Prompts with a larger share of words in common count as the same prompt."""


def _plain(prompt: Prompt) -> str:
    words = words_of(prompt).lower()
    return " ".join("".join(letter if letter.isalnum() else " " for letter in words).split())


def _without(groups: Groups, others: Mapping[str, list[Prompt]]) -> Groups:
    """The groups without prompts that are the same, or nearly the same, as one in ``others``."""
    seen = {_plain(prompt) for prompts in others.values() for prompt in prompts}
    by_size: dict[int, list[set[str]]] = {}
    for words in (set(prompt.split()) for prompt in seen):
        by_size.setdefault(len(words), []).append(words)

    def is_new(prompt: Prompt) -> bool:
        plain = _plain(prompt)
        own = set(plain.split())
        sizes = range(int(len(own) * NEAR), int(len(own) / NEAR) + 2) if len(own) <= 40 else ()
        return plain not in seen and not any(
            len(own & words) > NEAR * len(own | words) for size in sizes for words in by_size.get(size, ())
        )

    return {name: [p for p in prompts if is_new(p)] for name, prompts in groups.items()}


def format_groups(model: FrozenModel, groups: Groups) -> dict[str, list[tuple[int, ...]]]:
    """The prompts in the model's chat format."""
    return {name: [formatted(model, prompt) for prompt in prompts] for name, prompts in groups.items()}


def formatted(model: FrozenModel, prompt: Prompt, most: int = CONTEXT) -> tuple[int, ...]:
    """A prompt in the model's chat format. A text is cut so that all is at most ``most`` tokens long."""
    if isinstance(prompt, str):
        return tuple(model.chat_ids(prompt, most))
    return conversation_ids(model, messages_of(prompt))
