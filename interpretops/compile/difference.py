"""How two policies differ: in their YAML, and in what the engine would apply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from interpretops.plan import Plan, SiteEdits
from interpretops.policy import Policy

ABSENT = "-"


@dataclass(frozen=True)
class Change:
    """One value that is not the same in both."""

    section: str
    """`meta`, `gates`, `interventions`, `constraints`, `evaluation`, `edits` or `sources`."""
    place: str
    """Where in the section: `harmful-request.conditions[0].threshold`, or `site 16.resid_post`."""
    before: str
    after: str


def policy_changes(one: Policy, other: Policy) -> list[Change]:
    """Differences in the YAML, including defaults, in field order.

    Gates are compared by name and interventions by position.
    """
    first, second = one.model_dump(mode="json"), other.model_dump(mode="json")
    return [
        Change(section, place, before, after)
        for section in first
        for place, before, after in _differences(first[section], second.get(section), "")
    ]


def plan_changes(one: Plan, other: Plan) -> list[Change]:
    """Differences in what the engine applies: the edits per site, and the sha256 of each artifact used."""
    found: list[Change] = []
    for site in sorted({*one.edits, *other.edits}, key=lambda site: site.order):
        first, second = one.edits.get(site), other.edits.get(site)
        before, after = _describe(first), _describe(second)
        if before == after and _numbers(first) != _numbers(second):
            after = f"{after}, with other numbers"
        if before != after:
            found.append(Change("edits", f"site {site}", before, after))
    for kind in sorted({*one.provenance, *other.provenance}):
        left, right = dict(one.provenance.get(kind, {})), dict(other.provenance.get(kind, {}))
        for name in sorted({*left, *right}):
            before, after = _digest(left.get(name)), _digest(right.get(name))
            if before != after:
                found.append(Change("sources", f"{kind}: {name}", before, after))
    return found


def _describe(edits: SiteEdits | None) -> str:
    if edits is None:
        return ABSENT
    parts = [f"{len(edits.units)} rank-one edits"]
    if edits.head_scale is not None:
        parts.append(f"{len(edits.head_scale.gate)} head scales")
    if edits.topk is not None:
        parts.append(f"a TopK encoder of {len(edits.topk.bias)} features")
    return ", ".join(parts)


def _numbers(edits: SiteEdits | None) -> list[bytes]:
    if edits is None:
        return []
    parts = [edits.units, edits.head_scale, edits.topk]
    return [
        value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
        for part in parts
        if part is not None
        for value in vars(part).values()
    ]


def _digest(source: Mapping[str, Any] | None) -> str:
    return ABSENT if source is None else str(source["sha256"])[:12]


def _differences(first: Any, second: Any, place: str) -> Iterator[tuple[str, str, str]]:
    """Every leaf that differs, as (place, before, after)."""
    if first == second:
        return
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys((*first, *second)):
            inner = f"{place}.{key}" if place else str(key)
            yield from _differences(first.get(key), second.get(key), inner)
    elif isinstance(first, list) and isinstance(second, list) and any(map(_is_nested, (*first, *second))):
        for index in range(max(len(first), len(second))):
            left, right = (side[index] if index < len(side) else None for side in (first, second))
            yield from _differences(left, right, f"{place}[{index}]")
    else:
        yield place or "all of it", _show(first), _show(second)


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)


def _show(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_show(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    return str(value)
