"""The HTTP front end: listeners, bounds, the audit log, and what a revision must show."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from interpretops.settings.section import Name, Port, Seconds, Section


class GatewaySettings(Section):
    """The HTTP front end: where it listens and what it bounds."""

    host: Name = "127.0.0.1"
    """Address of the OpenAI endpoint. It listens beyond this machine only with `paths.keys`."""
    port: Port = 8000
    """Port of the OpenAI endpoint; 0 takes any free one."""
    admin_host: Name = "127.0.0.1"
    """Address of the admin routes and metrics. It listens beyond this machine only with `paths.keys`."""
    admin_port: Port = 8001
    """Port of the admin routes and metrics; 0 takes any free one."""
    allowed_hosts: tuple[Name, ...] = ()
    """Further host names of the OpenAI endpoint when no keys are required, such as that of a reverse proxy on
    this machine. Requests with another `Host`, and from web pages of another origin, are refused."""
    tls_cert: Path | None = None
    """Certificate chain (PEM) of the OpenAI endpoint, which then accepts TLS only. When the file changes, new
    connections use the new certificate."""
    tls_key: Path | None = None
    """Private key (PEM) of `tls_cert`."""
    admin_tls_cert: Path | None = None
    """Certificate chain (PEM) of the admin listener, which then accepts TLS only."""
    admin_tls_key: Path | None = None
    """Private key (PEM) of `admin_tls_cert`."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 * 1024 * 1024
    """Largest request body that is read."""
    max_body_values: Annotated[int, Field(ge=1000)] = 200_000
    """Most values in a request body: a number or a string counts once, a key 4 times, an object or array 8
    times, in proportion to the time that parsing takes. Raise it for prompts with more token ids than
    this."""
    max_choices: Annotated[int, Field(ge=1)] = 64
    """Largest `n`: answers to one prompt."""
    max_answers: Annotated[int, Field(ge=1)] = 256
    """Most answers of one request: its prompts times `n`. Each counts as a request in a tenant's limits."""
    max_answer_bytes: Annotated[int, Field(ge=64 * 1024)] = 32 * 1024 * 1024
    """Largest answer that is not streamed. Such an answer is held until its receipt proves it. A larger one
    fails with `answer_too_large`, and the engine stops; a stream has no such bound."""
    body_timeout_s: Seconds = 30.0
    """Longest wait for a request body, for the first request of a new connection, and for a TLS handshake or
    shutdown."""
    keepalive_s: Seconds = 75.0
    """How long an idle connection stays open between requests. Keep it longer than the idle timeout of load
    balancers in front (nginx, AWS: 60 s). Otherwise they send requests on connections that are being
    closed."""
    keys_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 300.0
    """How long the last valid keys stay in force while the file `paths.keys` cannot be read. After that every
    request is refused until it can. Deleting the file revokes all keys at once."""
    connect_timeout_s: Seconds = 5.0
    """Longest wait for a connection to the engine."""
    request_timeout_s: Seconds = 600.0
    """Longest time of a request, from admission to its last byte."""
    stream_idle_timeout_s: Seconds = 120.0
    """Longest pause of the engine within a stream."""
    breaker_failures: Annotated[int, Field(ge=1)] = 5
    """Failed requests in a row after which an engine gets no requests for a while (circuit breaker)."""
    breaker_open_s: Seconds = 5.0
    """How long the circuit breaker stays open before it lets one request through."""
    client_idle_timeout_s: Seconds = 60.0
    """How long a client may leave an answer unread before its connection is closed."""
    shutdown_grace_s: Seconds = 30.0
    """How long running requests may take to finish after SIGTERM. The process ends at most 25 s later."""
    watch_policies: bool = True
    """Reload when a file under `paths.policies` changes."""

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.port == self.admin_port != 0:
            raise ValueError(f"port and admin_port are both {self.port}, but must differ")
        return self

    @model_validator(mode="after")
    def _certificates_have_keys(self) -> Self:
        for cert, key in (("tls_cert", "tls_key"), ("admin_tls_cert", "admin_tls_key")):
            if (getattr(self, cert) is None) != (getattr(self, key) is None):
                raise ValueError(f"{cert} and {key} belong together; give both or neither")
        return self


class PolicySettings(Section):
    """What a policy revision must show before it serves."""

    require_cards: bool = False
    """Serve a policy with `success_criteria` only if its Risk Card meets them, or after a recorded override.
    False: a revision that is there at start-up is served with a warning and a metric; a later one still waits
    as a candidate."""
    shadow_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of requests that a revision in state `shadow` also answers. No client sees these answers."""


class CanarySettings(Section):
    """Prompts that the gateway itself sends with and without each policy, to see what the policy does now.
    The answers are judged and discarded."""

    interval_s: Seconds | None = None
    """Pause before each pair of requests. None: no canary. With a canary the engine also answers harmful
    prompts unsteered; nobody can read these answers."""
    suite: Path | None = None
    """YAML file with the lists of prompts `harmful` and `benign`. None: the sixteen prompts that are
    shipped."""
    max_tokens: Annotated[int, Field(ge=8, le=1024)] = 40
    """Longest answer in tokens."""


class TracingSettings(Section):
    """OpenTelemetry traces of requests: names, sizes and edits, never prompts or answers."""

    endpoint: Name | None = None
    """Collector for the spans, over OTLP/HTTP, e.g. `http://collector:4318`. None: no traces."""
    service: Name = "interpretops-gateway"
    """`service.name` of the spans."""
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests that are traced, unless the caller's `traceparent` decides."""


class AuditSettings(Section):
    """The audit log: which request got which revision, and who changed what. It holds no prompts or
    answers."""

    path: Path | None = None
    """File of the log. When it is full, a new one is started beside it. None: no audit log, and no
    overrides."""
    fsync: Literal["always", "interval", "never"] = "interval"
    """When lines are forced to disk: after every batch, once a second, or when the system chooses."""
    rotate_bytes: Annotated[int, Field(ge=4096)] = 64 * 1024 * 1024
    """Size at which the file is rotated. The hash chain continues in the next file."""
    on_failure: Literal["refuse", "continue"] = "refuse"
    """What happens to requests while the log cannot be written: refused with 503, or served without a
    record."""
