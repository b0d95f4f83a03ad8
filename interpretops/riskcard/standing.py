"""The standing of a policy revision: its card in the cards folder, and whether it meets the criteria."""

from dataclasses import dataclass
from pathlib import Path

from interpretops.errors import InterpretOpsError
from interpretops.policy import Policy, SuccessCriteria
from interpretops.riskcard.card import RiskCard
from interpretops.riskcard.file import RiskCardError, load_card
from interpretops.riskcard.verdict import Verdict, verdict

CARDS_FOLDER = "cards"
"""Folder in the policies folder: ``<policy id>.json``, with the same card as Markdown and HTML."""


@dataclass(frozen=True)
class Standing:
    """What is known of a revision's measured behaviour."""

    card: RiskCard | None
    """The card of exactly this revision; None if it is missing or cannot be trusted."""
    verdict: Verdict | None
    """The card's verdict under the criteria; None without a card."""
    reason: str
    """One line: why the revision passes, fails or has no card."""

    @property
    def passed(self) -> bool:
        """Whether the card shows that the criteria are met; False without a card or criteria."""
        return self.verdict is not None and self.verdict.passed


def card_path(policy_id: str, policies: Path) -> Path:
    """The path of a policy's card: ``<policies>/cards/<policy id>.json``."""
    return policies / CARDS_FOLDER / f"{policy_id}.json"


def card_for(policy: Policy, revision: str, policies: Path) -> Standing:
    """Check the card of a policy revision against the policy's current criteria.

    revision  64 hex, of the compiled plan
    policies  the folder of policies; cards lie in ``cards/`` below it

    Reads one file, imports no torch, and raises nothing: a card that is missing, damaged, edited by hand or
    of another revision does not count, and ``reason`` says so. The criteria are the policy's current ones,
    not those in the card: stricter criteria apply at once.
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
