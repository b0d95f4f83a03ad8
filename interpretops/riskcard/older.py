"""Reads cards of the first layout: what it meant by some names is something else now, and so absent."""

from typing import Any

REASON = "this card was made before this was measured; measure the policy anew with `mechctl eval`"
LCO = (
    "this card was made when LCO came from `make bench`, which times a plan of its own and not this policy; "
    "measure the policy anew with `mechctl eval`"
)
CIRCUIT = (
    "this card was made when CCS and CS came from any circuit of the class, whether or not the policy came "
    "from it; measure the policy anew with `mechctl eval`"
)
_NOTES_OF = ("LCO is that of `make bench`", "Circuit ")


def as_current(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a card's file in today's layout; that of today's own as it is.

    No number is carried over to a name that has another meaning now, and none is made up.
    """
    if content.get("format") != 1 or not isinstance(content.get("measures"), dict):
        return content
    measures = {
        **content["measures"],
        "causal_contribution": {"absent": CIRCUIT},
        "circuit_stability": {"absent": CIRCUIT},
        "latency_cost_overhead": {"absent": LCO},
        "exact_match_loss": {"absent": REASON},
        "bleu_loss": {"absent": REASON},
    }
    notes = content.get("notes", ())
    if isinstance(notes, list):
        notes = [note for note in notes if not str(note).startswith(_NOTES_OF)]
    return {**content, "format": 2, "measures": measures, "circuit": {"absent": CIRCUIT}, "notes": notes}
