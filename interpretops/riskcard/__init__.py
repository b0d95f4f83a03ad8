"""The Risk Card: a policy revision's measured behaviour, with intervals, checked against its criteria."""

from interpretops.riskcard.card import BASELINES, MEASURES, RiskCard
from interpretops.riskcard.file import RiskCardError, load_card, save_card
from interpretops.riskcard.standing import Standing, card_for, card_path, standing
from interpretops.riskcard.verdict import Verdict, verdict

__all__ = [
    "BASELINES",
    "MEASURES",
    "RiskCard",
    "RiskCardError",
    "Standing",
    "Verdict",
    "card_for",
    "card_path",
    "load_card",
    "save_card",
    "standing",
    "verdict",
]
