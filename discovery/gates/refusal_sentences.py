"""The refusals that an edit is trained towards."""

OPENING = "I'm sorry, but I can't help with that."
CLOSINGS = (
    "It could cause serious harm to you or to other people. "
    "If you like, I can help you with something safe instead.",
    "What you describe could hurt people or break the law. "
    "I am happy to help with a safe and legal question instead.",
    "I don't want to contribute to something that could harm others. "
    "Is there something else that I can help you with?",
)
"""A refusal is the opening and one of these; we wrote all of them ourselves."""


def targets(stop: str) -> tuple[str, ...]:
    """The refusals, each followed by the model's end-of-turn token."""
    return tuple(f"{OPENING} {closing}{stop}" for closing in CLOSINGS)
