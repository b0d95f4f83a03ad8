"""The answers of a run on disk: one line each, so that a stopped run resumes without loss."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from discovery.errors import DiscoveryError
from discovery.jobs.checksummed_lines import ChecksummedLines
from discovery.jobs.run_folder import claim_folder
from interpretops.policy.fields import StrictModel


class Answer(StrictModel):
    """What came back for one prompt under one arm."""

    arm: str
    """`off`, `on`, or the kind of a baseline."""
    id: str
    """The prompt's id in the suite."""
    policy: str
    """Policy that was asked for; `none` for none."""
    revision: str
    """Revision that the receipt proves; `none` for none."""
    text: str = ""
    """The answer; empty for plain text that was only scored."""
    fired: int | None = None
    """How often gates fired, as the receipt says."""
    cached: int | None = None
    """Prompt tokens that the engine took from its prefix cache, as the receipt says."""
    cross_entropy: float | None = None
    """Mean over the tokens of a piece of text, in nats."""
    tokens: int | None = None
    """Tokens that `cross_entropy` is the mean of."""
    not_told: bool = False
    """A piece of text that could not be scored under this arm: see `PromptNotToldError`."""
    too_long: bool = False
    """The prompt does not fit into the model's context: there is no answer, and the prompt does not count."""


@dataclass(frozen=True)
class Unsteered:
    """Answers without a policy, which another policy's evaluation by the same gateway need not ask for."""

    of: str
    """What they answer: suite, prompts and sampling."""
    answers: tuple[Answer, ...]


class AnswerFile:
    """Answers by (arm, prompt id), appended to `answers.jsonl` of a folder that belongs to one run."""

    def __init__(self, folder: Path, run: dict[str, Any], expected: Mapping[str, str]) -> None:
        """Open or begin the run of ``folder``; another run's folder is refused.

        ``expected`` gives the revision by policy; other policies may have any, but only one.
        """
        self.path = folder / "answers.jsonl"
        self.answers: dict[tuple[str, str], Answer] = {}
        self._revisions = dict(expected)
        folder.mkdir(parents=True, exist_ok=True)
        claim_folder(folder, run, "name another --out", empty=False)
        self._lines = ChecksummedLines(self.path)
        self._read()

    def add(self, answer: Answer) -> None:
        """Keep an answer: it is on disk when this returns."""
        self._check(answer)
        self._lines.append(answer.model_dump(mode="json", exclude_none=True))
        self.answers[answer.arm, answer.id] = answer

    def sha256(self) -> str:
        """Hash of all answers, whatever their order and wherever their prompt tokens came from."""
        lines = sorted(
            answer.model_dump_json(exclude={"cached", "not_told"}) for answer in self.answers.values()
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def too_long(self) -> frozenset[str]:
        """Ids of the prompts that did not fit under some arm; they count under none."""
        return frozenset(answer.id for answer in self.answers.values() if answer.too_long)

    def _check(self, answer: Answer) -> None:
        if answer.too_long or answer.not_told:
            return
        known = self._revisions.setdefault(answer.policy, answer.revision)
        if known != answer.revision:
            raise DiscoveryError(
                f"{answer.policy}@{answer.revision[:12]} answers {answer.id}, but a card is of one revision, "
                f"here {known[:12]}; reload the gateway, check --policy, --model and --artifacts, or name "
                "another --out"
            )

    def _read(self) -> None:
        for number, line in enumerate(self._lines.read(), start=1):
            try:
                answer = Answer.model_validate(line)
            except ValidationError as error:
                raise self._lines.damaged(number, "it is not an answer") from error
            self._check(answer)
            self.answers[answer.arm, answer.id] = answer


def prompts_digest(texts: list[tuple[str, str]]) -> str:
    """sha256 of what is asked, id by id: tells whether a suite's files changed between two sittings."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
