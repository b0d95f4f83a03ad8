"""Asks every prompt of a suite under every arm, a few at a time, and keeps what is proven."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from discovery.errors import DiscoveryError
from discovery.evaluation.answers.answer_file import Answer, AnswerFile
from discovery.evaluation.answers.endpoint import NONE, Endpoint, PromptNotToldError, PromptTooLongError
from discovery.evaluation.suites.suite import ASKED, Prompt
from discovery.jobs.progress import Meter, meter


@dataclass(frozen=True)
class Arm:
    """One way of answering that is compared."""

    name: str
    """`off`, `on`, or the kind of a baseline."""
    policy: str
    """Id of the policy, or `none`."""
    system: str | None = None
    """System prompt in front of every prompt."""
    only: frozenset[str] | None = None
    """Ids of the prompts that it is asked; None: all."""

    def asks(self, prompt: Prompt) -> bool:
        """Whether this arm is asked a prompt: plain text is scored, and that under a policy or none."""
        if self.only is not None and prompt.id not in self.only:
            return False
        return prompt.role in ASKED or (prompt.role == "text" and self.system is None)


@dataclass(frozen=True)
class Sampling:
    """How answers are generated: greedily, so that both arms differ by the policy alone."""

    model: str
    max_tokens: int
    seed: int
    context: str | None = None
    """What the app says before every prompt of every arm."""

    def chat(self, prompt: Prompt, system: str | None) -> dict[str, Any]:
        """Body of a chat request."""
        told = "\n\n".join(part for part in (self.context, system) if part)
        first = [{"role": "system", "content": told}] if told else []
        return {
            "model": self.model,
            "messages": [*first, {"role": "user", "content": prompt.text}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "seed": self.seed,
        }

    def plain(self, prompt: Prompt, system: str | None) -> dict[str, Any]:
        """Body of a request to go on with plain text."""
        return {
            "model": self.model,
            "prompt": prompt.text if system is None else f"{system}\n\n{prompt.text}",
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "seed": self.seed,
        }

    def score(self, prompt: Prompt) -> dict[str, Any]:
        """Body of a request for the log-probabilities of plain text."""
        return {
            "model": self.model,
            "prompt": prompt.text,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }


async def collect(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    arms: Sequence[Arm],
    sampling: Sampling,
    answers: AnswerFile,
    concurrency: int,
) -> None:
    """Fill ``answers``; what is there already is not asked again."""
    pairs = [(arm, prompt) for prompt in prompts for arm in arms if arm.asks(prompt)]
    missing = [(arm, prompt) for arm, prompt in pairs if (arm.name, prompt.id) not in answers.answers]
    with meter("eval", len(pairs), "answers", done=len(pairs) - len(missing)) as progress:
        todo = iter(missing)
        workers = [
            asyncio.create_task(_work(todo, endpoint, sampling, answers, progress))
            for _ in range(max(1, concurrency))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _work(
    todo: Iterator[tuple[Arm, Prompt]],
    endpoint: Endpoint,
    sampling: Sampling,
    answers: AnswerFile,
    progress: Meter,
) -> None:
    for arm, prompt in todo:
        scored = prompt.role == "text"
        route = "/v1/chat/completions" if prompt.chat and not scored else "/v1/completions"
        if scored:
            body = sampling.score(prompt)
        else:
            body = (sampling.chat if prompt.chat else sampling.plain)(prompt, arm.system)
        try:
            told, proof = await endpoint.post(route, body, arm.policy)
        except (PromptTooLongError, PromptNotToldError) as error:
            answers.add(
                Answer(
                    arm=arm.name,
                    id=prompt.id,
                    policy=arm.policy,
                    revision=NONE,
                    too_long=isinstance(error, PromptTooLongError),
                    not_told=isinstance(error, PromptNotToldError),
                )
            )
            progress.advance(1)
            continue
        result = _scores(told, prompt) if scored else {"text": _text(told, prompt)}
        answers.add(
            Answer(
                arm=arm.name,
                id=prompt.id,
                policy=arm.policy,
                revision=proof.revision,
                fired=proof.gates_fired,
                cached=proof.cached_tokens,
                **result,
            )
        )
        progress.advance(1)


def _text(told: dict[str, Any], prompt: Prompt) -> str:
    try:
        choice = told["choices"][0]
        return str((choice["message"]["content"] if prompt.chat else choice["text"]) or "")
    except (KeyError, IndexError, TypeError) as error:
        raise DiscoveryError(f"{prompt.id}: the endpoint's answer holds no message") from error


def _scores(told: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
    """Mean cross-entropy of the text's tokens; the first has nothing before it and is not scored."""
    try:
        listed = told["choices"][0]["prompt_logprobs"]
        logs = [float(next(iter(entry.values()))["logprob"]) for entry in listed if entry]
    except (KeyError, IndexError, TypeError, ValueError, StopIteration, AttributeError) as error:
        raise DiscoveryError(f"{prompt.id}: the endpoint gave no prompt_logprobs") from error
    if not logs:
        raise DiscoveryError(f"{prompt.id}: too short a text to be scored")
    return {"cross_entropy": -sum(logs) / len(logs), "tokens": len(logs)}
