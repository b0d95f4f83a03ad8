"""How a policy revision stands: its card in the folder of cards, and whether that meets the criteria."""

from dataclasses import dataclass
from pathlib import Path

from interpretops.errors import InterpretOpsError
from interpretops.policy import Policy, SuccessCriteria
from interpretops.riskcard.card import RiskCard
from interpretops.riskcard.file import RiskCardError, load_card
from interpretops.riskcard.verdict import Verdict, verdict

CARDS_FOLDER = "cards"
"""Folder beside the policies: ``<policy id>.json``, and the same as Markdown and HTML."""


@dataclass(frozen=True)
class Standing:
    """What is known of a revision's measured behaviour."""

    card: RiskCard | None
    """The card of exactly this revision; None when there is none, or it cannot be trusted."""
    verdict: Verdict | None
    """The card held against the criteria; None without a card."""
    reason: str
    """One line: why the revision passes, fails or has no card."""

    @property
    def passed(self) -> bool:
        """Whether the revision has shown what its criteria demand; False without a card or criteria."""
        return self.verdict is not None and self.verdict.passed


def card_path(policy_id: str, policies: Path) -> Path:
    """Where a policy's card lies: ``<policies>/cards/<policy id>.json``."""
    return policies / CARDS_FOLDER / f"{policy_id}.json"


def card_for(policy: Policy, revision: str, policies: Path) -> Standing:
    """The card of a policy revision in a folder of policies, held against what the policy demands today.

    revision  64 hex, of the compiled plan
    policies  the folder of policies; cards lie in ``cards/`` below it

    Reads one file, imports no torch, and raises nothing: a card that is missing, damaged, changed by hand or
    of another revision is no card, and ``reason`` says so. The criteria are those of the policy as it stands,
    not those in the card: a bar that was raised since holds at once.
    """
    return standing(policy.meta.id, revision, policies, policy.criteria)


def standing(policy_id: str, revision: str, policies: Path, criteria: SuccessCriteria) -> Standing:
    """As `card_for`, for callers that hold id and criteria only."""
    path = card_path(policy_id, policies)
    try:
        if not path.is_file():
            return Standing(None, None, f"{path}: there is no Risk Card; measure it with `mechctl eval`")
        card = load_card(path, revision=revision)
        if card.policy.id != policy_id:
            raise RiskCardError(f"{path}: policy.id = {card.policy.id!r}, but the policy is {policy_id!r}")
    except (InterpretOpsError, OSError) as error:
        return Standing(None, None, (str(error).splitlines() or [type(error).__name__])[0])
    found = verdict(card, criteria)
    lines = [finding.line() for finding in found.findings if not finding.passed]
    return Standing(card, found, f"{path}: verdict {found.status}" + "".join(f"; {line}" for line in lines))
