"""Decides which policy a request gets: what its bindings demand, and what it may choose within them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from multidict import CIMultiDictProxy

from interpretops.errors import ConfigError
from interpretops.settings import Binding
from proxy.refusal import PolicyConflict, PolicyForbidden, UnknownModel, UnknownPolicy

HEADER: Final = "X-Steering-Policy"
NONE: Final = "none"
"""The policy id that asks for an unsteered answer, where the bindings allow it."""

_CHOICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Caller:
    """What of a request its bindings look at."""

    route: str
    model: str
    """The model's name, without a policy."""
    choice: str | None
    """The policy that the caller names, by header or model alias."""
    key_sha256: str | None = None


@dataclass(frozen=True)
class Decision:
    """The policy that applies, and why."""

    policy: str
    mode: str
    """`mandatory`, `default` or `optional`; `unbound` when nothing applies and nothing was asked for."""


def read_caller(route: str, headers: CIMultiDictProxy[str], model: str, served: Collection[str]) -> Caller:
    """The caller's own wishes, from header and model alias; raises when they contradict each other."""
    by_header = _header_choice(headers.getall(HEADER, []))
    name, by_alias = split_alias(model, served)
    if by_header is not None and by_alias is not None and by_header != by_alias:
        raise PolicyConflict(
            f"{HEADER} = {by_header!r}, but model = {model!r} names another policy; name one", param="model"
        )
    choice = by_alias if by_header is None else by_header
    return Caller(route, name, choice, _key_hash(headers.get("Authorization")))


def split_alias(model: str, served: Collection[str]) -> tuple[str, str | None]:
    """``<model>+<policy id>`` in its parts; the model must be one that is served."""
    if model in served:
        return model, None
    name, plus, policy = model.rpartition("+")
    if plus and name in served and _CHOICE.fullmatch(policy):
        return name, policy
    raise UnknownModel(f"model {model[:128]!r} is not served here; see GET /v1/models", param="model")


def decide(bindings: Sequence[Binding], caller: Caller, known: Collection[str]) -> Decision:
    """Apply the bindings that match: mandatory before default before optional, whatever the caller asks.

    ``known`` are the ids of all policies in the catalogue, loaded or not.
    """
    matching = [binding for binding in bindings if _matches(binding, caller)]
    mandatory = {binding.policy for binding in matching if binding.mode == "mandatory"}
    if mandatory:
        if len(mandatory) > 1:
            raise ConfigError(f"bindings: {sorted(mandatory)} are all mandatory for one request; keep one")
        (demanded,) = mandatory
        if caller.choice not in (None, demanded):
            raise PolicyForbidden(
                f"policy {demanded!r} is mandatory here, but the request asks for {caller.choice!r}; "
                f"leave out {HEADER} and the model's +<policy>"
            )
        return Decision(demanded, "mandatory")
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
    """The policies that this caller may choose, in order; none of them when one is mandatory."""
    matching = [binding for binding in bindings if _matches(binding, caller)]
    if any(binding.mode == "mandatory" for binding in matching):
        return []
    named = {binding.policy for binding in matching}
    return sorted(set(known) if "*" in named else set(known) & named)


def check_bindings(bindings: Sequence[Binding]) -> None:
    """Refuse at start what could only fail at a request: two mandatory policies for one caller."""
    seen: dict[Mapping[str, object] | str, str] = {}
    for index, binding in enumerate(bindings):
        if binding.mode != "mandatory":
            continue
        key = binding.match.model_dump_json()
        if seen.setdefault(key, binding.policy) != binding.policy:
            raise ConfigError(
                f"bindings[{index}].policy = {binding.policy!r}, but {seen[key]!r} is already mandatory "
                "for the same requests; keep one"
            )


def demanded(bindings: Sequence[Binding]) -> set[str]:
    """Policies that requests get without asking: without them the gateway cannot do its work."""
    return {binding.policy for binding in bindings if binding.mode != "optional"} - {NONE}


def _matches(binding: Binding, caller: Caller) -> bool:
    match = binding.match
    return (
        match.model_alias in (None, caller.model)
        and match.key_sha256 in (None, caller.key_sha256)
        and match.route in (None, caller.route)
    )


def _header_choice(values: Sequence[str]) -> str | None:
    if not values:
        return None
    if len(values) > 1:
        raise PolicyConflict(f"{HEADER} is given {len(values)} times; give it once")
    value = values[0].strip()
    if not _CHOICE.fullmatch(value):
        raise UnknownPolicy(f"{HEADER} holds no policy id; write one policy id, or none")
    return value


def _key_hash(authorization: str | None) -> str | None:
    scheme, _, key = (authorization or "").partition(" ")
    return hashlib.sha256(key.strip().encode()).hexdigest() if scheme.lower() == "bearer" and key else None
