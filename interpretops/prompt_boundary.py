"""Whether what a plan does to a token depends on where the prompt ends."""

from __future__ import annotations

from interpretops.plan import Plan


def depends_on_prompt_end(plan: Plan) -> bool:
    """Whether a token is edited otherwise when it is sent as part of a prompt than when it is generated.

    So it is with every gate that opens at the end of a prompt or acts in one phase. Without such a gate each
    position is edited by what stands before it alone. Two things follow where it is True: the distribution at
    a prompt's position is not what the policy would have generated there, so that callers must not see it;
    and the keys and values of an answer are not those of the same text in the next turn's prompt, so that the
    prefix cache must not hold them.
    """
    return any(gate.scope != "token" or gate.phase != "both" for gate in plan.gates)
