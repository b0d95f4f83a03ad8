"""The prompts of `fit-gate`, sorted into training, selection and test, with no prompt in two of them."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.sources import DataList, read_prompts, refuse_noncommercial

CONTEXT = 1024

Groups = dict[str, list[str]]


@dataclass(frozen=True)
class GateData:
    """Prompts by group; the name of a group says which side it is on."""

    train: Groups
    select: Groups
    test: Groups

    def sides(self, groups: Groups) -> tuple[list[str], list[str]]:
        """(harmful, benign) prompts of some groups, in their order."""
        harmful = [prompt for name, prompts in groups.items() if is_harmful(name) for prompt in prompts]
        benign = [prompt for name, prompts in groups.items() if not is_harmful(name) for prompt in prompts]
        return harmful, benign


def is_harmful(group: str) -> bool:
    """Whether a group's prompts should be refused."""
    return "harmful" in group or "jailbreak" in group


def load_gate_data(data: DataList, seed: int) -> GateData:
    """Read all prompts. Raises `DiscoveryError` when a side is empty.

    Groups are named ``harmful…``, ``benign…``, ``select_…`` and ``test_…``; ``wrappers`` holds templates with
    ``{request}`` in them, for sources with ``wrap: true``.
    """
    wrappers = [text for source in data.groups.get("wrappers", ()) for text in read_prompts(source)]
    for text in wrappers:
        if "{request}" not in text:
            raise DiscoveryError(f"wrappers: {text!r} has no {{request}} to put a prompt into")
    chance = random.Random(seed)  # noqa: S311 (sampling, no secret)
    groups: Groups = {}
    for name, sources in data.groups.items():
        if name == "wrappers":
            continue
        if not name.startswith("test_"):
            refuse_noncommercial(sources, purpose="a learned edit")
        prompts: list[str] = []
        for source in sources:
            found = read_prompts(source)
            if source.wrap:
                if not wrappers:
                    raise DiscoveryError(
                        f"{name}: {source.path.name} has wrap: true, but there are no wrappers"
                    )
                found = [chance.choice(wrappers).replace("{request}", prompt) for prompt in found]
            prompts += found
        groups[name] = list(dict.fromkeys(prompts))
    test = {name: prompts for name, prompts in groups.items() if name.startswith("test_")}
    select = {name: prompts for name, prompts in groups.items() if name.startswith("select_")}
    train = {name: prompts for name, prompts in groups.items() if name not in test and name not in select}
    select = _without(select, test)
    train = _without(_without(train, test), select)
    found_data = GateData(train, select, test)
    for stage, chosen in (("training", train), ("select_", select)):
        if not all(found_data.sides(chosen)):
            missing = "harmful" if not found_data.sides(chosen)[0] else "benign"
            raise DiscoveryError(f"the {stage} groups hold no {missing} prompts; a gate needs both sides")
    return found_data


def _plain(prompt: str) -> str:
    return " ".join("".join(letter if letter.isalnum() else " " for letter in prompt.lower()).split())


def _without(groups: Groups, others: Mapping[str, list[str]]) -> Groups:
    seen = {_plain(prompt) for prompts in others.values() for prompt in prompts}
    return {name: [p for p in prompts if _plain(p) not in seen] for name, prompts in groups.items()}


def format_groups(model: FrozenModel, groups: Groups) -> dict[str, list[tuple[int, ...]]]:
    """The prompts in the model's chat format."""
    return {name: [tuple(model.chat_ids(p, CONTEXT)) for p in prompts] for name, prompts in groups.items()}
