"""The answers of a run on disk: one line each, so that a run that was stopped goes on without loss."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from discovery.errors import DiscoveryError
from interpretops.files.json_file import read_json_object
from interpretops.policy.fields import Strictly


class Answer(Strictly):
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
        self._claim(folder / "run.json", run)
        self._read()
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Keep an answer: it is on disk when this returns."""
        self._check(answer)
        try:
            self._file.write(answer.model_dump_json(exclude_none=True) + "\n")
            self._file.flush()
        except OSError as error:
            raise DiscoveryError(
                f"{self.path}: cannot be written ({error.strerror}); what was answered is kept, "
                "the same command goes on"
            ) from error
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

    def _claim(self, path: Path, run: dict[str, Any]) -> None:
        if not path.exists():
            from discovery.jobs.run_record import write_json

            write_json(path, run)
            return
        found = read_json_object(path, DiscoveryError)
        for key in sorted({*found, *run}):
            if found.get(key) != run.get(key):
                raise DiscoveryError(
                    f"{path}: {key} = {found.get(key)!r}, but this run has {run.get(key)!r}; "
                    "name another --out"
                )

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # the last line was being written when the run was stopped
            os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                answer = Answer.model_validate_json(line)
            except ValidationError as error:
                raise DiscoveryError(
                    f"{self.path}: line {number} is no answer; delete that line to ask again"
                ) from error
            self._check(answer)
            self.answers[answer.arm, answer.id] = answer


def prompts_digest(texts: list[tuple[str, str]]) -> str:
    """sha256 of what is asked, id by id: tells whether a suite's files changed between two sittings."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
