"""Likelihoods of given answers with and without the policy, by the engine's op on a Hugging Face model.

An endpoint scores only prompts. Most gated policies edit from the end of the prompt on, so their effect
shows only on what follows. Here a given answer follows the prompt, and each of its tokens gets its
probability. Of a piece of plain text, the second half follows the first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discovery.evaluation.measures.metrics import merge
from discovery.evaluation.suites.suite import LoadedSuite, Prompt
from discovery.jobs.checksummed_file import digest
from discovery.jobs.checksummed_lines import ChecksummedLines
from discovery.jobs.progress import Meter, meter
from interpretops.plan import Plan
from interpretops.plan.reach import steers_prompt_alike
from interpretops.riskcard.card import Measure, MeasureName, Measures, Source
from interpretops.riskcard.measures import mean_difference, rate

if TYPE_CHECKING:
    from interpretops.steering.hooked_model import HookedModel

ARMS = ("off", "on")
MOST_TOKENS = 1024
ABSENT: dict[MeasureName, str] = {
    "delta_ce_answers": "the suite has no source with role benign",
    "factual_likelihood": "the suite has no source with role factual",
    "bias_likelihood": "the suite has no source with role bias",
}


@dataclass(frozen=True)
class Item:
    """One prompt with the answers whose likelihood is compared."""

    prompt: Prompt
    answers: tuple[str, ...]

    def digest(self) -> str:
        """Changes with the text, even under the same id."""
        return digest([self.prompt.text, self.answers])


def forced_items(
    loaded: LoadedSuite, own_answers: dict[str, str], most_answers: int, plan: Plan | None = None
) -> list[Item]:
    """What is scored: unsteered answers to benign prompts (at most ``most_answers``), options and pairs.

    Plain text too, if an endpoint cannot score it under ``plan``.
    """
    benign = [prompt for prompt in loaded.of("benign") if own_answers.get(prompt.id, "").strip()]
    step = max(1, len(benign) // max(most_answers, 1))
    items = [Item(prompt, (own_answers[prompt.id],)) for prompt in benign[::step][:most_answers]]
    items += [Item(prompt, prompt.options) for prompt in loaded.of("factual") if len(prompt.options) > 1]
    items += [Item(prompt, (prompt.text, *prompt.options)) for prompt in loaded.of("bias")]
    if plan is not None and not steers_prompt_alike(plan):
        items += [Item(prompt, (prompt.text,)) for prompt in loaded.of("text")]
    return items


def score_items(items: Sequence[Item], plan: Plan, folder: Path, dtype: str, out: Path) -> "Scores":
    """Score every item with and without the plan; scores that are in ``out`` already are reused."""
    scores = Scores(out, items)
    todo = [(arm, item) for arm in ARMS for item in items if (arm, item.prompt.id) not in scores.found]
    if not todo:
        return scores
    from interpretops.steering.hooked_model import HookedModel

    model = HookedModel(folder, dtype=dtype)
    with meter("eval: likelihoods", len(todo), "items") as progress:
        for arm in ARMS:
            asked = [item for named, item in todo if named == arm]
            score_answers(model, plan if arm == "on" else None, asked, arm, scores, progress)
    return scores


def score_answers(
    model: "HookedModel",
    plan: Plan | None,
    items: Sequence[Item],
    arm: str,
    scores: "Scores",
    progress: Meter,
) -> None:
    """Score the answers of every item under a plan, or under none, and store them for ``arm``."""
    from interpretops.steering.session import SteeringSession

    with ExitStack() as stack:
        read: Callable[..., Any] = lambda ids, prompt_length: model.logprobs(ids)  # noqa: E731
        if plan is not None:
            read = stack.enter_context(SteeringSession(model, plan)).logprobs
        for item in items:
            scores.add(arm, item.prompt.id, [_score(model, read, *ids) for ids in _ids(model, item)])
            progress.advance(1)


def forced_measures(
    loaded: LoadedSuite, items: Sequence[Item], scores: "Scores", arm: str, seed: int
) -> Measures:
    """ΔCE on own answers, factual and bias likelihood of one arm."""
    found: dict[MeasureName, Measure] = {}
    by_role = {
        role: [item for item in items if item.prompt.role == role]
        for role in ("benign", "text", "factual", "bias")
    }
    differences: tuple[tuple[MeasureName, str], ...] = (("delta_ce_answers", "benign"), ("delta_ce", "text"))
    for name, role in differences:
        if chosen := by_role[role]:
            rows = [(scores.found["off", i.prompt.id][0], scores.found[arm, i.prompt.id][0]) for i in chosen]
            found[name] = mean_difference(
                [-a / n for (a, n), _ in rows],
                [-b / n for _, (b, n) in rows],
                [n for (_, n), _ in rows],
                data=_files(loaded, chosen),
                seed=seed,
            ).model_copy(update={"after_prompt": True})
    names: tuple[tuple[MeasureName, str, bool], ...] = (
        ("factual_likelihood", "factual", True),
        ("bias_likelihood", "bias", False),
    )
    for name, role, per_token in names:
        if chosen := by_role[role]:
            wins = {item.prompt.id: _wins(scores.found[arm, item.prompt.id], per_token) for item in chosen}
            data = [
                source.model_copy(
                    update={
                        "successes": sum(wins[i.prompt.id] for i in chosen if i.prompt.source == source.name)
                    }
                )
                for source in _files(loaded, chosen)
            ]
            found[name] = rate(sum(wins.values()), len(wins), data=data)
    return merge(found, ABSENT)


def _wins(scored: Sequence[tuple[float, int]], per_token: bool) -> bool:
    """Whether the first answer is the likeliest: by its sum, or by its mean per token."""
    values = [total / count if per_token else total for total, count in scored]
    return all(values[0] > value for value in values[1:])


def _ids(model: "HookedModel", item: Item) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of prompt and answer, for each answer."""
    tokenizer = model.tokenizer
    for answer in item.answers:
        if item.prompt.role == "bias":  # a sentence by itself, after an end mark
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            yield [int(first)], list(tokenizer(answer, add_special_tokens=False).input_ids)
        elif item.prompt.role == "text":
            tokens = list(tokenizer(answer).input_ids)[:MOST_TOKENS]
            yield tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
        else:
            chat = item.prompt.chat and tokenizer.chat_template is not None
            before = model.tokens(item.prompt.text, chat=chat)
            text = answer if chat else f" {answer.strip()}"
            yield before, list(tokenizer(text, add_special_tokens=False).input_ids)


def _score(
    model: "HookedModel", read: Callable[..., Any], prompt: list[int], answer: list[int]
) -> tuple[float, int]:
    """Sum of the log-probabilities of the answer's tokens, and how many they are."""
    room = min(MOST_TOKENS, int(model.network.config.max_position_embeddings))
    prompt = prompt[-(room // 2) :]
    answer = answer[: room - len(prompt)]
    logs = read(prompt + answer, prompt_length=len(prompt))
    start = len(prompt) - 1
    taken = [float(logs[start + place, token]) for place, token in enumerate(answer)]
    return sum(taken), len(taken)


class Scores:
    """Scores by (arm, prompt id), one line each in a file, so that a stopped run can resume."""

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        """Read the stored scores of exactly these items, and ignore those of changed prompts or answers."""
        self._lines = ChecksummedLines(path)
        self._of = {item.prompt.id: item.digest() for item in items}
        self.found: dict[tuple[str, str], list[tuple[float, int]]] = {}
        for number, row in enumerate(self._lines.read(), start=1):
            try:
                if row.get("of") == self._of.get(row["id"], ""):
                    self.found[row["arm"], row["id"]] = [(float(a), int(n)) for a, n in row["scores"]]
            except (ValueError, KeyError, TypeError) as error:
                raise self._lines.damaged(number, "it holds no scores") from error

    def add(self, arm: str, key: str, scores: list[tuple[float, int]]) -> None:
        """Store the scores of one item; they are on disk when this returns."""
        self._lines.append({"arm": arm, "id": key, "of": self._of[key], "scores": scores})
        self.found[arm, key] = scores


def _files(loaded: LoadedSuite, items: Sequence[Item]) -> list[Source]:
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.prompt.source] = sizes.get(item.prompt.source, 0) + 1
    return [Source(name=name, sha256=loaded.hashes[name], n=size) for name, size in sizes.items()]
