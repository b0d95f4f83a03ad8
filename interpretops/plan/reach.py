"""Whether a plan edits text sent as a prompt in the same way as the same text when it is generated."""

from __future__ import annotations

from collections.abc import Collection

from interpretops.plan import Gate, Plan


def steers_prompt_alike(plan: Plan) -> bool:
    """Whether every edit acts at prompt positions exactly as it would at generated ones.

    True if each gate in use decides at every token separately (scope `token`) and in both phases, as the
    always-open gate does. A gate of scope `prompt` or `prompt_end` opens at the prompt's last token, one of
    scope `answer` after it. Earlier positions are not edited, so the model would read an answer sent as a
    prompt without the policy. For a composed plan, this must hold for every part.
    """
    return all(_acts_alike(plan.gates[index]) for index in _gates_in_use(plan))


def depends_on_prompt_end(plan: Plan) -> bool:
    """Whether any gate of the plan, used or not, opens at the end of a prompt or acts in only one phase.

    If so, an answer's keys, values and gate readings differ from those of the same text in the next turn's
    prompt, and the prefix cache must not reuse them.
    """
    return not all(_acts_alike(gate) for gate in plan.gates)


def _acts_alike(gate: Gate) -> bool:
    return gate.scope == "token" and gate.phase == "both" and not gate.probe


def _gates_in_use(plan: Plan) -> Collection[int]:
    used: set[int] = set()
    for edits in plan.edits.values():
        used.update(edits.units.gate.tolist())
        if edits.head_scale is not None:
            used.update(edits.head_scale.gate.tolist())
    return used
