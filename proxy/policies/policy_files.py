"""Compiles policy files into revisions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from interpretops.compile import compile_policy
from interpretops.errors import InterpretOpsError, PolicyError
from interpretops.files.regular_file import read_regular
from interpretops.plan import ModelSpec
from interpretops.plan.reach import steers_prompt_alike
from interpretops.policy import Constraints, SuccessCriteria, load_policy
from interpretops.riskcard import standing
from proxy.observe.unforeseen_error import describe_error

MAX_POLICY_BYTES: Final = 2**20


@dataclass(frozen=True, eq=False)
class Revision:
    """A compiled policy."""

    policy: str
    revision: str
    plan: bytes
    digest: str
    """Digest that every rank must attest; see `Plan.digest`."""
    description: str
    target_class: str
    file: Path
    model_fingerprint: str
    compiled_at: datetime
    criteria: SuccessCriteria | None
    """Success criteria for the policy's Risk Card; None if it states none."""
    card: str
    """Risk Card status at compile time, in one line."""
    proven: bool
    """Whether the card met the criteria at compile time, or no criteria are stated."""
    constraints: Constraints = field(default_factory=Constraints)
    """The policy's latency budget, and what happens when it is exceeded."""
    conditional: bool = False
    """Whether it has a conditional gate."""
    steers_prompt: bool = False
    """Whether it edits prompt text as it edits generated text, so that prompt log-probabilities are safe."""

    @property
    def label(self) -> str:
        """``<id>@<12 hex>``, as shown to callers."""
        return f"{self.policy}@{self.revision[:12]}"


def judge(policy: str, revision: str, folder: Path, criteria: SuccessCriteria | None) -> tuple[bool, str]:
    """Whether the Risk Card in ``folder``/cards lets a revision become active, and why, in one line."""
    if criteria is None:
        return True, "the policy states no success criteria"
    found = standing(policy, revision, folder, criteria)
    return found.passed, found.reason


def file_digest(path: Path) -> str:
    """Identifies the content of a policy file, or the error that prevents reading it."""
    try:
        return hashlib.sha256(read_regular(path, MAX_POLICY_BYTES)).hexdigest()
    except OSError as error:
        # Loading the file will report the error.
        return f"unreadable: {error.strerror}"


class BrokenPolicyError(PolicyError):
    """A policy file that cannot be compiled."""

    def __init__(self, policy: str | None, message: str) -> None:
        super().__init__(message)
        self.policy = policy
        """The policy id, if the file could be read that far."""


class DuplicatePolicyError(BrokenPolicyError):
    """A policy file whose id another file already uses."""


def compile_file(path: Path, model: ModelSpec, artifacts: Path, folder: Path) -> Revision:
    """Load and compile one file. Raises `BrokenPolicyError`. Takes seconds: run it in a thread."""
    policy_id: str | None = None
    try:
        policy = load_policy(path)
        policy_id = policy.meta.id
        plan = compile_policy(policy, model=model, artifacts=artifacts)
        data, digest = plan.to_bytes(), plan.digest()
    except InterpretOpsError as error:
        raise BrokenPolicyError(policy_id, str(error)) from error
    except OSError as error:
        raise BrokenPolicyError(policy_id, f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:
        # An unexpected error in one file must not stop the others from being read.
        what = describe_error(error)
        why = f"{path}: unexpected {what['kind']} in {what['place']}; report it"
        raise BrokenPolicyError(policy_id, why) from error
    revision, criteria = hashlib.sha256(data).hexdigest(), policy.criteria
    stated = criteria if criteria.model_dump(exclude_none=True) else None
    proven, card = judge(policy_id, revision, folder, stated)
    return Revision(
        policy=policy.meta.id,
        revision=revision,
        criteria=stated,
        card=card,
        proven=proven,
        plan=data,
        digest=digest,
        description=policy.meta.description,
        target_class=policy.meta.target_class,
        file=path,
        model_fingerprint=model.fingerprint,
        compiled_at=datetime.now(UTC),
        constraints=policy.constraints,
        conditional=any(map(len, plan.gates)),
        steers_prompt=steers_prompt_alike(plan),
    )
