"""Who may do what: tenants, their limits, model aliases, and which policy applies to whom."""

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
"""The tenant of every caller when no keys are required."""
CANARY = "canary"
"""The tenant that the gateway's own requests are counted for."""


class Limits(Section):
    """How much a tenant may use. A limit that is not set does not apply. A request with several prompts, or
    with `n`, counts once for each answer. A request that could never fit is refused with 400."""

    requests_per_minute: Positive | None = None
    """Requests a minute. A burst may use the whole minute at once."""
    tokens_per_minute: Positive | None = None
    """Prompt and answer tokens a minute. A request is admitted on an estimate and charged for what it
    used."""
    concurrency: Positive | None = None
    """Answers in progress at a time."""
    token_budget: Positive | None = None
    """Tokens in one `budget_period`; it survives restarts. A request is admitted if what it may use is left:
    its prompt and its `max_tokens`, if given."""
    budget_period: Literal["day", "month"] = "month"
    """How often the budget starts again, in UTC."""


class SharedLimits(Section):
    """Limits that several gateways share through Redis."""

    redis_url: SecretStr | None = None
    """`redis://user:password@host:port/database`, or `rediss://…` for TLS. Requests and tokens a minute,
    and budgets, are then counted over all gateways; `concurrency` stays per gateway. None: this gateway
    counts on its own. Never shown in logs."""
    when_away: Literal["refuse", "local"] = "refuse"
    """What happens to requests of limited tenants while Redis is unreachable: refused with 503, or counted by
    each gateway on its own."""
    timeout_s: Seconds = 0.5
    """Longest wait for Redis within a request. After it, `when_away` decides about the request. Redis counts
    as unreachable only after `away_after_s` without any answer."""
    away_after_s: Seconds = 2.0
    """Time without any answer after which Redis counts as unreachable. From then on no request waits for it,
    and an alert fires. The gateway tries again every second."""

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        url = self.redis_url
        if url is not None and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("redis_url must start with redis://, rediss:// or unix://")
        return self


class KeptRequests(Section):
    """Keep a tenant's requests and answers: redacted (`compliance.pii_redaction`), encrypted with the
    tenant's own key, and deleted after `compliance.retention_days`. This covers every route on which the
    model runs, streamed or not. Routes that only count or convert tokens keep nothing."""

    key: str
    """Where the keys are, never a key itself: `env:NAME` or `file:PATH`, one key a line, the newest first.
    The newest encrypts; the others decrypt older records. `mechctl transcripts key` makes one."""

    @field_validator("key")
    @classmethod
    def _is_a_reference(cls, key: str) -> str:
        kind, _, name = key.partition(":")
        if kind not in ("env", "file") or not name:
            # Not shown: it may be a key.
            raise ValueError("must be env:NAME or file:PATH, the place of the keys, and not a key itself")
        return key


class Tenant(Section):
    """One user of the gateway."""

    id: Label
    """Name of the tenant in keys, bindings, logs and metrics."""
    models: tuple[Name, ...] | None = None
    """Models and aliases that it may use. None: all."""
    routes: tuple[Route, ...] | None = None
    """Routes that it may use. None: all."""
    limits: Limits = Field(default_factory=Limits)
    """How much it may use."""
    transcripts: KeptRequests | None = None
    """Keep its requests and answers. None: nothing is kept."""


class Alias(Section):
    """Another name for the model. To keep a tenant from getting around an alias's bindings, list only that
    alias in its `models`."""

    name: AliasName
    """What clients write."""
    model: Name | None = None
    """The engine's name for the model. None: its first."""


class Match(Section):
    """Which requests a binding applies to. All given fields must match; without any, every request does."""

    tenant: Label | None = None
    """A tenant's id."""
    key: Label | None = None
    """The id of a key, as `mechctl keys list` shows it."""
    model_alias: Name | None = None
    """The model name as the client writes it, without a `+<policy id>` ending."""
    route: Route | None = None
    """The route of the request."""


class Binding(Section):
    """Which policy applies to whom."""

    match: Match = Field(default_factory=Match)
    """The requests that this binding applies to."""
    policy: PolicyChoice
    """A policy's id, `none`, or `*` for every policy loaded (only with mode `optional`)."""
    mode: Literal["mandatory", "default", "optional"] = "optional"
    """`mandatory`: always applies, the client cannot choose. `default`: applies unless the client chooses
    another one that it may use, or `none`. `optional`: the client may choose it."""

    @model_validator(mode="after")
    def _star_is_a_choice(self) -> Self:
        if self.policy == "*" and self.mode != "optional":
            raise ValueError(f"policy '*' with mode {self.mode!r}, but only one policy can apply: name it")
        return self


def check_names(
    tenants: Sequence[Tenant], aliases: Sequence[Alias], bindings: Sequence[Binding], *, with_keys: bool
) -> None:
    """Refuse bindings of tenants that are not declared, or of callers that cannot be identified without
    keys."""
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
                    f"bindings[{index}].match.{field} = {value!r}, but without keys no caller is "
                    "identified, so anybody could avoid it; set paths.keys"
                )
        if binding.match.tenant is not None and binding.match.tenant not in known:
            raise ValueError(
                f"bindings[{index}].match.tenant = {binding.match.tenant!r}, but tenants declares no such "
                f"tenant; {remedy(binding.match.tenant, known)}"
            )
