"""Finds names in the settings that match nothing. A binding that never matches silently guards nobody."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final, Literal, NamedTuple

from structlog.typing import FilteringBoundLogger

from interpretops.errors import ConfigError, EngineError
from interpretops.nearest_name import remedy
from interpretops.records.api_keys import ApiKey
from interpretops.settings import Binding, Settings
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Reason
from proxy.policies.binding import NONE

Kind = Literal["bindings", "tenants", "aliases"]
KINDS: Final[tuple[Kind, ...]] = ("bindings", "tenants", "aliases")


class Unmatched(NamedTuple):
    """A name that matches nothing."""

    kind: Kind
    """The section of the settings that contains it."""
    why: str
    """Location, name and remedy."""
    enforces: bool = False
    """Whether it is a mandatory or default binding."""
    starts: bool = False
    """Whether the gateway may start anyway: the name was once valid and has expired."""


def unmatched_keys(bindings: Sequence[Binding], keys: Sequence[ApiKey], now: datetime) -> list[Unmatched]:
    """Bindings on a key that no request can use: unknown, expired, or of another tenant."""
    by_id = {key.id: key for key in keys}
    found: list[Unmatched] = []
    for index, binding in enumerate(bindings):
        name = binding.match.key
        key = by_id.get(name or "")
        if name is None:
            continue
        expired = False
        if key is None:
            why = f"but paths.keys has no such key; {remedy(name, by_id)}"
        elif key.tenant is None:
            why = f"but that is a key of role {key.role}, which opens the admin listener only"
        elif binding.match.tenant not in (None, key.tenant):
            why = f"but that is a key of tenant {key.tenant!r}, and match.tenant is {binding.match.tenant!r}"
        elif key.expires is not None and key.expires <= now:
            why = f"but that key expired on {key.expires.isoformat()}; `mechctl keys rotate` renews it"
            expired = True
        else:
            continue
        enforces = binding.mode != "optional" and binding.policy != NONE
        place = f"bindings[{index}].match.key = {name!r}"
        found.append(Unmatched("bindings", f"{place}, {why}", enforces, expired))
    return found


def unmatched_models(settings: Settings, served: Collection[str]) -> list[Unmatched]:
    """Model names that are neither in ``served``, the engine's names, nor among the aliases."""
    known = {*served, *(alias.name for alias in settings.aliases)}
    found = [
        Unmatched("aliases", _why(f"aliases[{index}].model", alias.model, served))
        for index, alias in enumerate(settings.aliases)
        if alias.model is not None and alias.model not in served
    ]
    for index, tenant in enumerate(settings.tenants):
        for place, name in enumerate(tenant.models or ()):
            if name not in known:
                found.append(Unmatched("tenants", _why(f"tenants[{index}].models[{place}]", name, known)))
    for index, binding in enumerate(settings.bindings):
        name = binding.match.model_alias or ""
        if name and name not in known:
            enforces = binding.mode != "optional" and binding.policy != NONE
            why = _why(f"bindings[{index}].match.model_alias", name, known)
            found.append(Unmatched("bindings", why, enforces))
    return found


def unmatched_policies(bindings: Sequence[Binding], policies: Collection[str]) -> list[Unmatched]:
    """Bindings on a policy that has no file. Readiness separately reports those that enforce it."""
    return [
        Unmatched(
            "bindings",
            f"bindings[{index}].policy = {binding.policy!r}, but no policy has that id; "
            f"{remedy(binding.policy, policies)}",
        )
        for index, binding in enumerate(bindings)
        if binding.policy not in ("*", NONE, *policies)
    ]


class NameCheck:
    """Refuses unmatched names at start-up, and reports names that lose their match while running."""

    def __init__(
        self,
        settings: Settings,
        keys: Callable[[], Sequence[ApiKey]],
        served: Callable[[], Collection[str] | None],
        policies: Collection[str],
        metrics: Metrics,
        log: FilteringBoundLogger,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``served``: the engine's names for its model; None while no engine is ready.

        ``policies``: the current ids of the catalogue, a live view.

        Raises `ConfigError` for unmatched keys, and for models if this gateway starts the engine.
        """
        self._settings = settings
        self._keys = keys
        self._served = served
        self._policies = policies
        self._log = log
        self._now = now
        found = self._lost_keys()
        if not settings.engine.url:
            found += unmatched_models(settings, {settings.model.served_name})
        if wrong := [unmatched.why for unmatched in found if not unmatched.starts]:
            raise ConfigError("\n".join(wrong))
        for unmatched in found:
            log.error("name_unmatched", place=unmatched.kind, why=unmatched.why)
        for kind in KINDS:
            metrics.names_unmatched.labels(kind).set_function(partial(self._count, kind))

    def check_engine(self, served: Collection[str]) -> None:
        """Raise `EngineError` if a binding names a model that this engine does not serve.

        Unmatched aliases and tenants weaken no guard: they are only logged and counted.
        """
        found = unmatched_models(self._settings, served)
        for unmatched in found:
            self._log.error("name_unmatched", place=unmatched.kind, why=unmatched.why)
        if wrong := [unmatched.why for unmatched in found if unmatched.kind == "bindings"]:
            raise EngineError("\n".join(wrong))

    def note_policies(self) -> None:
        """Log bindings on unknown policies, once policies are loaded."""
        for unmatched in unmatched_policies(self._settings.bindings, self._policies):
            self._log.error("name_unmatched", place=unmatched.kind, why=unmatched.why)

    def not_ready(self) -> Iterator[Reason]:
        """Mandatory and default bindings that no request can match any more."""
        for unmatched in self._lost_keys():
            if unmatched.enforces:
                yield Reason("binding_unmatched", unmatched.why)

    def _lost_keys(self) -> list[Unmatched]:
        return unmatched_keys(self._settings.bindings, self._keys(), self._now())

    def _count(self, kind: Kind) -> int:
        served = self._served()
        found = self._lost_keys()
        if served is not None:
            found += unmatched_models(self._settings, served)
            found += unmatched_policies(self._settings.bindings, self._policies)
        return sum(unmatched.kind == kind for unmatched in found)


def _why(place: str, name: str, known: Collection[str]) -> str:
    # Bindings match model names without a policy, so suggest the base name.
    base = name.rpartition("+")[0]
    meant = f"did you mean {base!r}?" if base in known else remedy(name, known)
    return f"{place} = {name!r}, but no model or alias has that name; {meant}"
