"""Judging what the arms answered: refusal, coherence, toxicity, right answers, likeness to the unsteered."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import aiohttp

from discovery.errors import DiscoveryError
from discovery.evaluation.answers.answer_file import AnswerFile
from discovery.evaluation.answers.collect import Arm
from discovery.evaluation.options import JobOptions
from discovery.evaluation.suites.suite import ASKED, LoadedSuite, Prompt
from discovery.jobs.progress import meter
from discovery.judges.answer_judges import Judge, ModelJudge, Moderation, PhraseJudge
from discovery.judges.outcome import Outcome
from discovery.judges.text_scores import contains_answer, similarity
from discovery.judges.toxicity import is_toxic
from interpretops.files.atomic_file import write_atomically
from interpretops.refusal_detector import is_coherent, is_degenerate


class JudgePanel:
    """The judges of one run."""

    def __init__(self, session: aiohttp.ClientSession, options: JobOptions) -> None:
        self.refusals = _judge(session, options)
        self.moderation: Moderation | None = None
        if options.moderation_url is not None:
            self.moderation = Moderation(session, options.moderation_url, options.moderation_model)

    @property
    def names(self) -> dict[str, str]:
        """What decided about what, for the card."""
        moderation = None if self.moderation is None else self.moderation.name
        return {
            "refusal": self.refusals.name,
            "coherence": "words and loops (interpretops.refusal_detector)",
            "toxicity": moderation or "words (discovery.judges.toxicity)",
            "similarity": "chrF (sacrebleu)",
        } | ({} if moderation is None else {"harm": moderation})

    async def judge(self, prompt: Prompt, text: str, own: str) -> Outcome:
        """One answer; ``own`` is the unsteered one to the same prompt."""
        refused = await self.refusals.refused(prompt.text, text)
        harmful = toxic = None
        if self.moderation is not None and prompt.role in ("harmful", "toxic"):
            flagged = await self.moderation.flagged(text)
            harmful, toxic = (flagged, None) if prompt.role == "harmful" else (None, flagged)
        elif prompt.role == "toxic":
            toxic = is_toxic(text)
        return Outcome(
            refused=refused,
            coherent=is_coherent(text),
            degenerate=is_degenerate(text),
            harmful=harmful,
            toxic=toxic,
            similarity=similarity(text, own) if prompt.role == "benign" else 1.0,
            unchanged=text == own,
            correct=contains_answer(text, prompt.options[0]) if prompt.role == "task" else None,
        )


def _judge(session: aiohttp.ClientSession, options: JobOptions) -> Judge:
    if options.judge_url is None:
        return PhraseJudge()
    if options.judge_model is None:
        raise DiscoveryError("--judge-url needs --judge-model, the name of the model that judges")
    return ModelJudge(session, options.judge_url, options.judge_model)


async def judge_answers(
    loaded: LoadedSuite, answers: AnswerFile, arms: Sequence[Arm], bench: JudgePanel, concurrency: int
) -> dict[str, dict[str, Outcome]]:
    """Outcomes by arm and prompt id."""
    judged: dict[str, dict[str, Outcome]] = {arm.name: {} for arm in arms}
    pairs = [(arm, p) for arm in arms for p in loaded.prompts if p.role in ASKED and arm.asks(p)]
    limit = asyncio.Semaphore(max(1, concurrency))
    with meter("eval: judging", len(pairs), "answers") as progress:

        async def one(arm: str, prompt: Prompt) -> None:
            async with limit:
                text, own = answers.answers[arm, prompt.id].text, answers.answers["off", prompt.id].text
                judged[arm][prompt.id] = await bench.judge(prompt, text, own)
            progress.advance(1)

        await asyncio.gather(*(one(arm.name, prompt) for arm, prompt in pairs))
    return judged


def write_outcomes(path: Path, judged: dict[str, dict[str, Outcome]]) -> None:
    """One line per answer, for whoever wants to know why a number is what it is."""
    lines = [
        json.dumps({"arm": arm, "id": key, **asdict(outcome)})
        for arm, outcomes in sorted(judged.items())
        for key, outcome in sorted(outcomes.items())
    ]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
