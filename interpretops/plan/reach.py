"""Where a plan acts: whether text that is sent as a prompt is edited as it would be if it were generated."""

from __future__ import annotations

from collections.abc import Collection

from interpretops.plan import Gate, Plan


def steers_prompt_alike(plan: Plan) -> bool:
    """Whether every edit is in force at positions of the prompt exactly as it would be at generated ones.

    True when each gate that an edit uses is decided at every token by itself (scope `token`) and in both
    phases; the always-open gate is such a one. A gate of scope `prompt` or `prompt_end` opens at the prompt's
    last token: what the model computes at earlier positions is unedited, so that an answer sent as a prompt
    would be read without the policy. A plan composed of several is alike only if all of them are.
    """
    return all(_acts_alike(plan.gates[index]) for index in _gates_in_use(plan))


def depends_on_prompt_end(plan: Plan) -> bool:
    """Whether a gate of the plan, used or not, opens at the end of a prompt or acts in one phase.

    Then the keys and values of an answer, and what gates have read of it, are not those of the same text in
    the next turn's prompt, so that the prefix cache must not hold them for it.
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
