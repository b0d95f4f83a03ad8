"""The settings of who may do what: tenants, their limits, model aliases, and which policy binds whom."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, StringConstraints, field_validator, model_validator

from interpretops.nearest_name import remedy
from interpretops.settings.section import Label, Name, Seconds, Section

Route = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
]
PolicyChoice = Annotated[str, StringConstraints(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,127})$")]
AliasName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]
Positive = Annotated[int, Field(ge=1)]
ANONYMOUS = "anonymous"
"""The tenant of everybody where no keys are asked for."""
CANARY = "canary"
"""On whose account the gateway's own requests are counted."""


class Limits(Section):
    """How much a tenant may use; nothing given is no limit. A request of several prompts, or with `n`, counts
    as one request for each answer; one that could never fit is refused with 400."""

    requests_per_minute: Positive | None = None
    """Requests a minute, as many of them at once."""
    tokens_per_minute: Positive | None = None
    """Tokens a minute, read and written. A request is admitted on an estimate, and charged what it used."""
    concurrency: Positive | None = None
    """Answers at a time."""
    token_budget: Positive | None = None
    """Tokens in a `budget_period`; survives restarts. A request is admitted when what it may use is left, by
    its `max_tokens` where it states one."""
    budget_period: Literal["day", "month"] = "month"
    """When the budget begins anew, in UTC."""


class SharedLimits(Section):
    """Where several gateways count together what tenants use."""

    redis_url: SecretStr | None = None
    """`redis://user:password@host:port/database`, or `rediss://…` for TLS. Requests and tokens a minute and
    budgets are then those of all gateways together; `concurrency` stays each gateway's own. None: this one
    counts alone. Never shown in logs."""
    when_away: Literal["refuse", "local"] = "refuse"
    """What happens to requests of limited tenants while Redis does not answer: refused with 503, or counted
    by each gateway for itself."""
    timeout_s: Seconds = 0.5
    """Longest wait for an answer of Redis, within a request: then the request is treated as `when_away` says.
    Redis counts as away only when it has answered nothing for `away_after_s`."""
    away_after_s: Seconds = 2.0
    """How long Redis must have answered nothing before it counts as away: from then on no request waits for
    it, and an alert is due. It is tried again every second."""

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        url = self.redis_url
        if url is not None and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("redis_url must start with redis://, rediss:// or unix://")
        return self


class KeptRequests(Section):
    """That a tenant's requests and answers are kept: redacted (`compliance.pii_redaction`), sealed with the
    tenant's own key, and deleted after `compliance.retention_days`. So on every route on which the model
    runs, streamed or not; of those that only count or convert tokens nothing is kept."""

    key: str
    """Where the keys stand, never a key itself: `env:NAME` or `file:PATH`, one a line, the newest first. That
    one seals, the others open what was sealed before. `mechctl transcripts key` makes one."""

    @field_validator("key")
    @classmethod
    def _is_a_reference(cls, key: str) -> str:
        kind, _, name = key.partition(":")
        if kind not in ("env", "file") or not name:
            # Not shown: it may be a key.
            raise ValueError("must be env:NAME or file:PATH, where the keys stand, and not a key")
        return key


class Tenant(Section):
    """One user of the gateway."""

    id: Label
    """Its name, in keys, bindings, logs and metrics."""
    models: tuple[Name, ...] | None = None
    """Models and aliases it may name. None: all."""
    routes: tuple[Route, ...] | None = None
    """Routes it may use. None: all."""
    limits: Limits = Field(default_factory=Limits)
    """How much it may use."""
    transcripts: KeptRequests | None = None
    """Keep what it asks and is answered. None: nothing is kept."""


class Alias(Section):
    """Another name for the model. A tenant that must not get around an alias's bindings is given only that
    alias in its `models`."""

    name: AliasName
    """What clients write."""
    model: Name | None = None
    """The engine's name for the model; none takes its first."""


class Match(Section):
    """Which requests a binding is for: all that is given must hold; nothing given matches every request."""

    tenant: Label | None = None
    """A tenant's id."""
    key: Label | None = None
    """The id of a key, as `mechctl keys list` shows it."""
    model_alias: Name | None = None
    """The model name as the client writes it, without a `+<policy id>` ending."""
    route: Route | None = None
    """The route asked for."""


class Binding(Section):
    """Which policy applies to whom."""

    match: Match = Field(default_factory=Match)
    """The requests this binding is for."""
    policy: PolicyChoice
    """A policy's id, `none`, or `*` for every policy loaded (only with mode `optional`)."""
    mode: Literal["mandatory", "default", "optional"] = "optional"
    """`mandatory`: always applies, the client cannot choose. `default`: applies unless the client chooses
    another that is open to it, or `none`. `optional`: the client may choose it."""

    @model_validator(mode="after")
    def _star_is_a_choice(self) -> Self:
        if self.policy == "*" and self.mode != "optional":
            raise ValueError(f"policy '*' with mode {self.mode!r}, but only one policy can apply: name it")
        return self


def check_names(
    tenants: Sequence[Tenant], aliases: Sequence[Alias], bindings: Sequence[Binding], *, with_keys: bool
) -> None:
    """Refuse what names a tenant that is not declared, or binds callers whom nobody identifies."""
    for kind, names in (
        ("tenants", [tenant.id for tenant in tenants]),
        ("aliases", [alias.name for alias in aliases]),
    ):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{kind}: {twice[0]!r} is declared twice; keep one")
    known = sorted(tenant.id for tenant in tenants)
    if CANARY in known:
        raise ValueError(f"tenants: {CANARY!r} is the gateway's own; choose another id")
    for index, binding in enumerate(bindings):
        for field in ("tenant", "key"):
            value = getattr(binding.match, field)
            if value is not None and not with_keys:
                raise ValueError(
                    f"bindings[{index}].match.{field} = {value!r}, but without keys nobody is "
                    "known, and anybody could leave it out; set paths.keys"
                )
        if binding.match.tenant is not None and binding.match.tenant not in known:
            raise ValueError(
                f"bindings[{index}].match.tenant = {binding.match.tenant!r}, but tenants declares no such "
                f"tenant; {remedy(binding.match.tenant, known)}"
            )
