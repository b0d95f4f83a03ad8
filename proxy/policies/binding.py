"""Decides which policy a request gets: what bindings require, and what the caller may choose."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from multidict import CIMultiDictProxy

from interpretops.errors import ConfigError
from interpretops.settings import Binding, Match
from proxy.errors import PolicyConflict, PolicyForbidden, UnknownModel, UnknownPolicy
from proxy.openai_api.headers import POLICY_HEADER
from proxy.policies.compositions import joint_name

NONE: Final = "none"
"""The policy id that requests an unsteered answer, where bindings allow it."""

MAX_JOINT: Final = 8
"""Most sets of policies that may be mandatory together. Each takes rows in the engine's tables."""
_MAX_GROUPS: Final = 4096
_CHOICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Caller:
    """The properties of a request that bindings match."""

    route: str
    model: str
    """The model's name as the caller wrote it, without the policy."""
    choice: str | None
    """The policy that the caller names in a header or model alias."""
    tenant: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Decision:
    """The policy that applies, and the mode of the binding that selected it."""

    policy: str
    """Its id; `a+b` for policies that are mandatory together."""
    mode: str
    """`mandatory`, `default` or `optional`; `unbound` when no binding applies and none was asked for."""


def read_caller(
    route: str,
    headers: CIMultiDictProxy[str],
    model: str,
    served: Collection[str],
    tenant: str | None = None,
    key: str | None = None,
) -> Caller:
    """Read the caller's choice from header and model alias. Raises when the two contradict each other."""
    by_header = _header_choice(headers.getall(POLICY_HEADER, []))
    name, by_alias = split_alias(model, served)
    if by_header is not None and by_alias is not None and by_header != by_alias:
        raise PolicyConflict(
            f"{POLICY_HEADER} = {by_header!r}, but model = {model!r} names another policy; name one",
            param="model",
        )
    return Caller(route, name, by_alias if by_header is None else by_header, tenant, key)


def split_alias(model: str, served: Collection[str]) -> tuple[str, str | None]:
    """Split ``<model>+<policy id>``. The model must be one that is served."""
    if model in served:
        return model, None
    name, plus, policy = model.rpartition("+")
    if plus and name in served and _CHOICE.fullmatch(policy):
        return name, policy
    raise UnknownModel(f"model {model[:128]!r} is not served here; see GET /v1/models", param="model")


def decide(bindings: Sequence[Binding], caller: Caller, known: Collection[str]) -> Decision:
    """Apply the matching bindings: mandatory before default before optional.

    ``known``: ids of all policies in the catalogue, loaded or not.
    """
    matching = [binding for binding in bindings if _matches(binding, caller)]
    mandatory = {binding.policy for binding in matching if binding.mode == "mandatory"}
    if mandatory:
        required = joint_name(mandatory)
        if caller.choice not in (None, *mandatory):
            raise PolicyForbidden(
                f"policy {required!r} is mandatory here, but the request asks for {caller.choice!r}; "
                f"remove {POLICY_HEADER} and the model's +<policy>"
            )
        return Decision(required, "mandatory")
    if caller.choice is None:
        default = next((binding.policy for binding in matching if binding.mode == "default"), None)
        return Decision(NONE, "unbound") if default is None else Decision(default, "default")
    if caller.choice == NONE:
        return Decision(NONE, "optional")
    open_to_caller = {binding.policy for binding in matching}
    if caller.choice not in known or not ({"*", caller.choice} & open_to_caller):
        raise UnknownPolicy(
            f"policy {caller.choice!r} does not exist or may not be chosen here; see GET /v1/models"
        )
    return Decision(caller.choice, "optional")


def choices(bindings: Sequence[Binding], caller: Caller, known: Collection[str]) -> list[str]:
    """The policies that this caller may choose, sorted; empty when a policy is mandatory."""
    matching = [binding for binding in bindings if _matches(binding, caller)]
    if any(binding.mode == "mandatory" for binding in matching):
        return []
    named = {binding.policy for binding in matching}
    return sorted(set(known) if "*" in named else set(known) & named)


def joint_mandatory(bindings: Sequence[Binding]) -> list[frozenset[str]]:
    """All sets of two or more policies that can be mandatory for one request. Raises on contradictions.

    Matches are conjunctions of equalities, so bindings that overlap pairwise all overlap in some request.
    """
    mandatory = [(i, binding) for i, binding in enumerate(bindings) if binding.mode == "mandatory"]
    for (first, one), (second, other) in itertools.combinations(mandatory, 2):
        differ = one.policy != other.policy and _overlap(one.match, other.match)
        if differ and NONE in (one.policy, other.policy):
            raise ConfigError(
                f"bindings[{second}].policy = {other.policy!r}, but bindings[{first}] makes {one.policy!r} "
                "mandatory for some of the same requests; keep one"
            )
    found: set[frozenset[str]] = set()
    groups: list[list[Binding]] = [[]]
    for _, binding in mandatory:
        joined = [
            [*group, binding] for group in groups if all(_overlap(b.match, binding.match) for b in group)
        ]
        groups.extend(joined)
        sets = [frozenset(member.policy for member in group) for group in joined]
        found.update(policies for policies in sets if len(policies) > 1)
        if len(groups) > _MAX_GROUPS or len(found) > MAX_JOINT:
            raise ConfigError(
                f"bindings: more than {MAX_JOINT} sets of policies can be mandatory together; bind fewer, or "
                "combine their interventions in one policy"
            )
    return sorted(found, key=sorted)


def explain(bindings: Sequence[Binding], caller: Caller) -> list[dict[str, object]]:
    """Every binding, and whether it matches this caller; for the admin API."""
    return [
        {
            "index": index,
            "policy": binding.policy,
            "mode": binding.mode,
            "matches": _matches(binding, caller),
            "match": binding.match.model_dump(exclude_none=True),
        }
        for index, binding in enumerate(bindings)
    ]


def required_policies(bindings: Sequence[Binding]) -> set[str]:
    """Policies that mandatory or default bindings require. Without them the gateway is not ready."""
    return {binding.policy for binding in bindings if binding.mode != "optional"} - {NONE}


def _matches(binding: Binding, caller: Caller) -> bool:
    match = binding.match
    return (
        match.model_alias in (None, caller.model)
        and match.tenant in (None, caller.tenant)
        and match.key in (None, caller.key)
        and match.route in (None, caller.route)
    )


def _overlap(one: Match, other: Match) -> bool:
    """Whether one request could match both. A key may belong to any tenant, since that can change."""
    pairs = zip(one.model_dump().values(), other.model_dump().values(), strict=True)
    return all(mine == theirs or mine is None or theirs is None for mine, theirs in pairs)


def _header_choice(values: Sequence[str]) -> str | None:
    if not values:
        return None
    if len(values) > 1:
        raise PolicyConflict(f"{POLICY_HEADER} is given {len(values)} times; give it once")
    value = values[0].strip()
    if not _CHOICE.fullmatch(value):
        raise UnknownPolicy(f"{POLICY_HEADER} does not hold a policy id; set it to one policy id, or to none")
    return value
