"""The sentences of refusal that an edit is taught."""

OPENING = "I'm sorry, but I can't help with that."
CLOSINGS = (
    "It could cause serious harm to you or to other people. "
    "If you like, I can help you with something safe instead.",
    "What you describe could hurt people or break the law. "
    "I am happy to help with a safe and legal question instead.",
    "I don't want to contribute to something that could harm others. "
    "Is there something else that I can help you with?",
)
"""The taught refusals are the opening and one of these, all our own words."""


def targets(stop: str) -> tuple[str, ...]:
    """The taught refusals, each ended by the model's end-of-turn token."""
    return tuple(f"{OPENING} {closing}{stop}" for closing in CLOSINGS)
