"""The settings of the HTTP front: listeners, bounds, the audit log, and what a revision must show."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from interpretops.settings.section import Name, Port, Seconds, Section


class GatewaySettings(Section):
    """The HTTP front: where it listens and what it bounds."""

    host: Name = "127.0.0.1"
    """Address of the OpenAI endpoint. Beyond this machine it is opened only with `paths.keys`."""
    port: Port = 8000
    """Port of the OpenAI endpoint; 0 takes any free one."""
    admin_host: Name = "127.0.0.1"
    """Address of the admin routes and metrics. Beyond this machine it is opened only with `paths.keys`."""
    admin_port: Port = 8001
    """Port of the admin routes and metrics; 0 takes any free one."""
    allowed_hosts: tuple[Name, ...] = ()
    """Further names under which the OpenAI endpoint is reached without keys, such as that of a reverse proxy
    on this machine. Requests to other names, and from web pages of other names, are refused then."""
    tls_cert: Path | None = None
    """Certificate chain (PEM) of the OpenAI endpoint; with it the endpoint speaks TLS only. When the file
    changes, new connections get it."""
    tls_key: Path | None = None
    """Private key (PEM) of `tls_cert`."""
    admin_tls_cert: Path | None = None
    """Certificate chain (PEM) of the admin listener; with it the listener speaks TLS only."""
    admin_tls_key: Path | None = None
    """Private key (PEM) of `admin_tls_cert`."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 * 1024 * 1024
    """Largest request body that is read."""
    max_body_values: Annotated[int, Field(ge=1000)] = 200_000
    """Most values of a request body: numbers and texts count once, a key 4 times, an object or list 8 times,
    as reading them takes. More would hold up every other request; prompts of more token numbers need more."""
    max_choices: Annotated[int, Field(ge=1)] = 64
    """Largest `n`: answers to one prompt."""
    max_answers: Annotated[int, Field(ge=1)] = 256
    """Most answers of one request: its prompts times `n`. Each counts as a request in a tenant's limits."""
    max_answer_bytes: Annotated[int, Field(ge=64 * 1024)] = 32 * 1024 * 1024
    """Largest answer that is not streamed: it is held whole until its receipt proves it. What is larger ends
    in `answer_too_large`, and the engine stops; a stream has no such bound."""
    body_timeout_s: Seconds = 30.0
    """Longest wait for a client to send its body, for a new connection to send its first request, and for
    TLS to begin and to end."""
    keepalive_s: Seconds = 75.0
    """How long a connection that has carried a request may wait for its next. Let it be longer than load
    balancers in front keep idle connections (nginx, AWS: 60 s): they would send requests on one that is just
    being closed, and see a reset."""
    keys_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 300.0
    """How long the keys that were read last stay in force while the file `paths.keys` cannot be taken. After
    that nobody is let in until it can. A file that is deleted revokes all keys at once."""
    connect_timeout_s: Seconds = 5.0
    """Longest wait for a connection to the engine."""
    request_timeout_s: Seconds = 600.0
    """Longest a request may take from admission to its last byte."""
    stream_idle_timeout_s: Seconds = 120.0
    """Longest silence of the engine within a stream."""
    breaker_failures: Annotated[int, Field(ge=1)] = 5
    """Requests in a row that do not reach an engine, or lose it, after which it is left alone."""
    breaker_open_s: Seconds = 5.0
    """How long an engine is left alone then, before one request is tried."""
    client_idle_timeout_s: Seconds = 60.0
    """Longest a client may leave unread what was sent to it before its connection is cut."""
    shutdown_grace_s: Seconds = 30.0
    """How long running requests may finish after a request to stop. The process ends at most 25 s later."""
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
    """Serve a policy that states `success_criteria` only on a Risk Card that meets them, or on a recorded
    override, from the first start on. False: a revision found at the start is served with a warning and a
    metric; a later one still waits as a candidate."""
    shadow_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of requests that a revision in state `shadow` answers a second time, unseen."""


class CanarySettings(Section):
    """A few prompts that the gateway itself asks with and without each policy, to see what it does now. The
    answers are judged and forgotten."""

    interval_s: Seconds | None = None
    """Pause before each pair of requests. None: no canary. With one, the engine also answers harmful prompts
    unsteered, for nobody to read."""
    suite: Path | None = None
    """YAML with lists `harmful` and `benign` of prompts. None: the sixteen that are shipped."""
    max_tokens: Annotated[int, Field(ge=8, le=1024)] = 40
    """Longest answer."""


class TracingSettings(Section):
    """OpenTelemetry traces of requests: names, sizes and what was edited, never what was said."""

    endpoint: Name | None = None
    """Where spans go, over OTLP/HTTP, e.g. `http://collector:4318`. None: no traces."""
    service: Name = "interpretops-gateway"
    """`service.name` of the spans."""
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests that are traced, where the caller has not decided it (`traceparent`)."""


class AuditSettings(Section):
    """The audit log: who got which revision, and who changed what. It holds no prompts and no answers."""

    path: Path | None = None
    """The log's file; a new one is begun beside it when it is full. None: no audit log, and no overrides."""
    fsync: Literal["always", "interval", "never"] = "interval"
    """When lines are forced to the disk: after every batch, once a second, or when the system likes."""
    rotate_bytes: Annotated[int, Field(ge=4096)] = 64 * 1024 * 1024
    """Size at which the file is set aside; the chain goes on in the next one."""
    on_failure: Literal["refuse", "continue"] = "refuse"
    """What happens to requests while the log cannot be written: refused with 503, or served unrecorded."""
