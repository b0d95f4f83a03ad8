"""Compiles policy files; content, not time, decides what is new."""

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
from proxy.observe.unforeseen_error import told

MAX_POLICY_BYTES: Final = 2**20


@dataclass(frozen=True, eq=False)
class Revision:
    """A compiled policy."""

    policy: str
    revision: str
    plan: bytes
    digest: str
    """What every rank must attest; see `Plan.digest`."""
    description: str
    target_class: str
    file: Path
    model_fingerprint: str
    compiled_at: datetime
    criteria: SuccessCriteria | None
    """What the policy demands of its Risk Card; None when it demands nothing."""
    card: str
    """How the card stood when this was compiled, in one line."""
    proven: bool
    """Whether the card met the criteria then, or none were stated."""
    constraints: Constraints = field(default_factory=Constraints)
    """What the policy may cost, and what happens when it costs more."""
    conditional: bool = False
    """Whether a gate with conditions decides where it acts."""
    steers_prompt: bool = False
    """Whether text sent as a prompt is edited as if it were generated, so that readings of it may be told."""

    @property
    def label(self) -> str:
        """``<id>@<12 hex>``, as callers see it."""
        return f"{self.policy}@{self.revision[:12]}"


def judge(policy: str, revision: str, folder: Path, criteria: SuccessCriteria | None) -> tuple[bool, str]:
    """Whether a revision may become active on its Risk Card in ``folder``/cards, and why, in one line."""
    if criteria is None:
        return True, "the policy demands nothing of its Risk Card"
    found = standing(policy, revision, folder, criteria)
    return found.passed, found.reason


def file_digest(path: Path) -> str:
    """What tells one state of a policy file from another."""
    try:
        return hashlib.sha256(read_regular(path, MAX_POLICY_BYTES)).hexdigest()
    except OSError as error:
        # Known, but unreadable: loading it will say why.
        return f"unreadable: {error.strerror}"


class BrokenPolicyError(PolicyError):
    """A policy file that does not become a plan."""

    def __init__(self, policy: str | None, message: str) -> None:
        super().__init__(message)
        self.policy = policy
        """The id that the file gives, where it could be read that far."""


class DuplicatePolicyError(BrokenPolicyError):
    """A policy file whose id another file has already."""


def compile_file(path: Path, model: ModelSpec, artifacts: Path, folder: Path) -> Revision:
    """Load and compile one file. Raises `BrokenPolicyError`; takes up to seconds, so run it in a thread."""
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
        # What nobody foresaw in one file must not keep the others from being looked at.
        what = told(error)
        why = f"{path}: unforeseen {what['kind']} in {what['place']}; report it"
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
