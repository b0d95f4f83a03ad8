"""A seed's configuration: tenants and limits, bindings, engines, and the expected policy of a request."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interpretops.settings import Settings, load_settings

POLICIES = {"alpha": 1, "beta": 2, "gamma": 3}
"""Policy id to the layer it edits."""
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
CHAT = ROUTES[0]
REQUEST_TIMEOUT_S = 20.0
BODY_TIMEOUT_S = 4.0

_Bindings = list[dict[str, Any]]
_ALL: _Bindings = [{"policy": "alpha", "mode": "mandatory"}]
_BOTH: _Bindings = [
    {"policy": "alpha", "mode": "mandatory"},
    {"policy": "beta", "mode": "mandatory", "match": {"route": CHAT}},
    {"policy": "*"},
]
_BY_TENANT: _Bindings = [
    {"policy": "alpha", "mode": "mandatory", "match": {"tenant": "slow"}},
    {"policy": "beta", "mode": "default", "match": {"tenant": "rated"}},
    {"policy": "*"},
]
_BY_ALIAS: _Bindings = [
    {"policy": "alpha", "mode": "mandatory"},
    {"policy": "gamma", "mode": "mandatory", "match": {"model_alias": "safe"}},
]
_SEVERAL: _Bindings = [
    {"policy": "alpha", "mode": "mandatory"},
    {"policy": "beta", "mode": "mandatory", "match": {"route": CHAT}},
    {"policy": "gamma", "mode": "mandatory", "match": {"model_alias": "safe"}},
]
TENANTS: list[dict[str, Any]] = [
    {"id": "free"},
    {"id": "slow", "limits": {"concurrency": 2}},
    {"id": "rated", "limits": {"requests_per_minute": 20, "tokens_per_minute": 3000}},
    {"id": "poor", "limits": {"token_budget": 400, "budget_period": "day"}},
]


@dataclass
class Scenario:
    """The configuration drawn from one seed."""

    bindings: list[dict[str, Any]]
    engines: int
    keys: bool
    audit: bool
    clients: int
    active_s: float
    shadow_share: float = 0.05
    """Share of traffic that shadows repeat."""
    tenants: list[dict[str, Any]] = field(default_factory=list)
    aliases: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def draw(cls, chance: random.Random) -> Scenario:
        """Draw a scenario."""
        keys = chance.random() < 0.7
        sets = [_ALL, _BOTH, _BY_ALIAS, _SEVERAL] + ([_BY_TENANT, _BY_TENANT] if keys else [])
        bindings = chance.choice(sets)
        everybody = {**chance.choice(TENANTS[:3]), "id": "anonymous"}
        return cls(
            bindings=bindings,
            engines=chance.choice((1, 1, 2, 3)),
            keys=keys,
            audit=chance.random() < 0.8,
            clients=chance.randint(2, 5),
            active_s=chance.choice((8.0, 15.0, 30.0)),
            shadow_share=chance.choice((0.05, 1.0)),
            tenants=TENANTS if keys else [everybody],
            aliases=[{"name": "safe"}] if bindings in (_BY_ALIAS, _SEVERAL) else [],
        )

    def settings(self, folder: Path) -> Settings:
        """The settings, as in a configuration file."""
        return load_settings(
            overrides={
                "paths.policies": folder / "policies",
                "paths.artifacts": folder,
                "paths.state": folder / "state",
                "paths.keys": folder / "keys.yaml" if self.keys else None,
                "audit.path": folder / "audit.jsonl" if self.audit else None,
                "engine.url": [f"unix://{engine_address(index)}" for index in range(self.engines)],
                "engine.silence_timeout_s": 10.0,
                "engine.startup_timeout_s": 30.0,
                "bindings": self.bindings,
                "policies.shadow_share": self.shadow_share,
                "tenants": self.tenants,
                "aliases": self.aliases,
                "gateway.body_timeout_s": BODY_TIMEOUT_S,
                "gateway.request_timeout_s": REQUEST_TIMEOUT_S,
                "gateway.stream_idle_timeout_s": 8.0,
                "gateway.client_idle_timeout_s": 6.0,
                "gateway.connect_timeout_s": 2.0,
                "gateway.breaker_open_s": 2.0,
                "gateway.shutdown_grace_s": 5.0,
            },
            environ={},
        )

    def limits(self, tenant: str) -> Mapping[str, Any]:
        """A tenant's limits."""
        return next((entry.get("limits", {}) for entry in self.tenants if entry["id"] == tenant), {})

    def required(self, tenant: str, route: str, model: str, choice: str | None) -> str | None:
        """The policy that must steer such a request, `none`, or None: it must be refused.

        Written independently from the documentation, so that a fault in `proxy.policies.binding` shows.
        """
        matching = [b for b in self.bindings if _matches(b.get("match", {}), tenant, route, model)]
        mandatory = sorted({b["policy"] for b in matching if b.get("mode") == "mandatory"})
        if mandatory:
            return "+".join(mandatory) if choice in (None, *mandatory) else None
        default = [b["policy"] for b in matching if b.get("mode") == "default"]
        if choice is None:
            return default[0] if default else "none"
        open_to_all = any(b["policy"] in ("*", choice) for b in matching)
        if choice == "none" or choice in default or (open_to_all and choice in POLICIES):
            return choice
        return None

    def always_demanded(self) -> Sequence[str]:
        """Policies without which some ordinary request cannot be served."""
        return sorted({b["policy"] for b in self.bindings if b.get("mode") in ("mandatory", "default")})


def engine_address(index: int) -> str:
    """Where an engine listens."""
    return f"/simulated/e{index}.sock"


def _matches(match: Mapping[str, str], tenant: str, route: str, model: str) -> bool:
    known = {"tenant": tenant, "route": route, "model_alias": model}
    return all(known.get(name) == value for name, value in match.items())
