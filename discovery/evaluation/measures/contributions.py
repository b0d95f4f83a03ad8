"""CCS of a Risk Card: how much of the policy's effect is lost without each of its parts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from discovery.evaluation.answers.answer_file import Answer
from discovery.evaluation.measures.likelihoods import Item, Scores, score_answers
from discovery.evaluation.measures.policy_parts import Part, parts_of, without_part
from discovery.evaluation.options import MOST_PARTS
from discovery.evaluation.suites.suite import ASKED, LoadedSuite, Prompt, spread
from discovery.jobs.progress import meter
from interpretops.plan import Plan
from interpretops.policy import Policy
from interpretops.riskcard.card import Contribution, Measure, Source
from interpretops.riskcard.measures import absent, causal_contribution

MOST_PROMPTS = 16
FEWEST_PROMPTS = 3
OFF, ON = "off", "on"


@dataclass(frozen=True)
class Effect:
    """What is taken apart: prompts whose answer the policy changes, and the parts of the policy."""

    items: tuple[Item, ...]
    """Each with the policy's answer, then the unsteered one."""
    parts: tuple[Part, ...]
    """Those that are ablated, in the policy's order."""
    all_parts: int


def changed_items(
    loaded: LoadedSuite, answers: Mapping[tuple[str, str], Answer], stopped: Collection[str] = ()
) -> list[Item]:
    """Prompts that the policy answers otherwise, from all over the suite, at most `MOST_PROMPTS`.

    Those of attacks that it stops, by id in ``stopped``; with too few of them, any harmful or toxic ones;
    with too few of those, any.
    """
    aimed = loaded.of("harmful", "toxic")
    items: list[Item] = []
    for prompts in ([prompt for prompt in aimed if prompt.id in stopped], aimed, loaded.of(*ASKED)):
        items = [item for prompt in prompts if (item := _changed(prompt, answers)) is not None]
        if len(items) >= FEWEST_PROMPTS:
            break
    return spread(items, MOST_PROMPTS)


def _changed(prompt: Prompt, answers: Mapping[tuple[str, str], Answer]) -> Item | None:
    """The prompt with both answers, if they differ."""
    on, off = answers.get((ON, prompt.id)), answers.get((OFF, prompt.id))
    if on is None or off is None or on.text == off.text or not on.text.strip() or not off.text.strip():
        return None
    return Item(prompt, (on.text, off.text))


def effect_of(
    policy: Policy,
    plan: Plan,
    artifacts: Path,
    loaded: LoadedSuite,
    answers: Mapping[tuple[str, str], Answer],
    seed: int,
    most: int = MOST_PARTS,
    stopped: Collection[str] = (),
) -> Effect:
    """What will be ablated, and on which prompts; ``stopped`` are ids of attacks that the policy stops."""
    parts = parts_of(policy, plan, artifacts)
    drawn = parts
    if len(parts) > most:
        places = np.random.default_rng(seed).choice(len(parts), most, replace=False)
        drawn = [parts[place] for place in sorted(places)]
    return Effect(tuple(changed_items(loaded, answers, stopped)), tuple(drawn), len(parts))


def score_effect(effect: Effect, plan: Plan, folder: Path, dtype: str, out: Path) -> Scores:
    """Likelihoods of both answers without the policy, with it, and without each part.

    What stands in ``out`` already is not scored again.
    """
    scores = Scores(out, effect.items)
    plans: dict[str, Plan | None] = {OFF: None, ON: plan}
    plans |= {_key(part): without_part(plan, part) for part in effect.parts}
    todo = {
        arm: missing
        for arm in plans
        if (missing := [item for item in effect.items if (arm, item.prompt.id) not in scores.found])
    }
    if not todo:
        return scores
    from interpretops.steering.hooked_model import HookedModel

    model = HookedModel(folder, dtype=dtype)
    total = sum(map(len, todo.values()))
    with meter("eval: contributions", total, "items") as progress:
        for arm, items in todo.items():
            score_answers(model, plans[arm], items, arm, scores, progress)
    return scores


def _key(part: Part) -> str:
    return f"without {part.name}" + (f" [{part.scale[0]}]" if part.scale else f" [{part.unit}]")


def contribution_measure(
    effect: Effect, scores: Scores, loaded: LoadedSuite, seed: int
) -> tuple[Measure, tuple[Contribution, ...], str | None]:
    """CCS, the share of each part, and a note on what was ablated."""
    if len(effect.items) < FEWEST_PROMPTS:
        return (
            absent(
                f"the policy changes the answer to {len(effect.items)} of the prompts, and its effect can be "
                f"taken apart on {FEWEST_PROMPTS} at least"
            ),
            (),
            None,
        )

    def preference(arm: str) -> list[float]:
        """Mean log-probability per token of the policy's answer less that of the unsteered one."""
        rows = [scores.found[arm, item.prompt.id] for item in effect.items]
        return [on[0] / on[1] - off[0] / off[1] for on, off in rows]

    with_all, without = np.array(preference(ON)), np.array(preference(OFF))
    lost = {part.name: with_all - np.array(preference(_key(part))) for part in effect.parts}
    measure, contributions = causal_contribution(
        with_all - without,
        lost,
        drawn_of=effect.all_parts,
        data=_files(loaded, effect.items),
        seed=seed,
    )
    if measure.absent is not None:
        return measure, (), None
    drawn = "" if len(effect.parts) == effect.all_parts else f"{len(effect.parts)} drawn of "
    note = (
        f"CCS: {drawn}{effect.all_parts} parts, each ablated alone on {len(effect.items)} prompts whose "
        "answer the policy changes. Effect: how much likelier, per token, it makes its own answer than the "
        "unsteered one. Of parts that do the same work, each loses little alone; of parts that only work "
        "together, each loses much."
    )
    return measure, contributions, note


def _files(loaded: LoadedSuite, items: Sequence[Item]) -> tuple[Source, ...]:
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.prompt.source] = sizes.get(item.prompt.source, 0) + 1
    return tuple(Source(name=name, sha256=loaded.hashes[name], n=n) for name, n in sizes.items())
