"""All settings, for every command: one strict, frozen model with a working default for each."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, StringConstraints, model_validator

from interpretops.model.default_model import DEFAULT_MODEL
from interpretops.settings.access import Alias, Binding, SharedLimits, Tenant, check_names
from interpretops.settings.gateway import (
    AuditSettings,
    CanarySettings,
    GatewaySettings,
    PolicySettings,
    TracingSettings,
)
from interpretops.settings.section import Name, Seconds, Section

GUARDED_ENGINE_ARGS = frozenset(
    {
        "--additional-config",
        "--api-key",
        "--host",
        "--kv-sharing-fast-prefill",
        "--model",
        "--port",
        "--served-model-name",
        "--uds",
        "--worker-extension-cls",
    }
)
"""Engine arguments that the guard sets itself or cannot allow."""
GUARDED_ENGINE_VARIABLES = frozenset(
    {
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "VLLM_API_KEY",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_PLUGINS",
        "VLLM_RPC_BASE_PATH",
        "VLLM_SERVER_DEV_MODE",
    }
)
"""Environment variables of the engine that the guard sets itself or cannot allow."""
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def user_cache_dir() -> Path:
    """The platform's own place for a user's caches."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "interpretops"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "interpretops"


def user_state_dir() -> Path:
    """The platform's own place for the state of a user's programs."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "interpretops"
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "interpretops"


def _shipped(name: str) -> Path:
    """``name`` in the working directory, else the one beside this package in a checkout."""
    here = Path.cwd() / name
    beside = Path(__file__).resolve().parents[2] / name
    return beside if not here.is_dir() and beside.is_dir() else here


class ModelSettings(Section):
    """The language model that is served and studied."""

    name: Name = DEFAULT_MODEL
    """The default model's name, a folder, or a Hugging Face id."""
    revision: Name | None = None
    """Branch, tag or commit of a Hugging Face id. None: the main branch."""
    alias: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")] | None = None
    """Name of the model as clients see it. None: the folder's name or the id."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of weights and activations. `auto`: the model's own."""
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """`cpu`, `cuda`, `cuda:<n>`, or `auto`: a GPU if there is one."""

    @property
    def served_name(self) -> str:
        """The model name in clients' requests."""
        if self.alias is not None:
            return self.alias
        folder = Path(self.name).expanduser()
        return folder.resolve().name if folder.is_dir() else self.name


class CacheSettings(Section):
    """Where files are kept that can be made again."""

    dir: Path = Field(default_factory=user_cache_dir)
    """Converted models, traces and logs. Default: `interpretops` in the user's own cache folder."""


class StoreSettings(Section):
    """Where records are stored beside the local disk. Not used yet; setting one logs a warning."""

    postgres_dsn: SecretStr | None = None
    """`postgresql://user:password@host:port/database`. Never shown in logs."""
    s3_endpoint: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$")] | None = None
    """URL of an S3 service. Its keys come from the environment, never from this file."""
    s3_bucket: Name | None = None
    """Bucket for artifacts."""

    @model_validator(mode="after")
    def _check_dsn(self) -> Self:
        dsn = self.postgres_dsn
        if dsn is not None and not dsn.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("postgres_dsn must start with postgresql://")
        return self


class RuntimeSettings(Section):
    """What steering may cost."""

    max_latency_overhead_pct: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20
    """Most that steering may add to latency, in percent of the unsteered engine."""
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Price of this machine in dollars an hour. With it, Risk Cards state the cost of 1,000 requests with and
    without the policy. None: they state no cost."""


class ComplianceSettings(Section):
    """What is kept of the traffic, and for how long."""

    pii_redaction: bool = True
    """Redact personal data in all texts that an operator has chosen to keep."""
    retention_days: Annotated[int, Field(ge=0)] = 14
    """Days after which kept texts are deleted. The audit log holds no texts and is not deleted."""
    phone_regions: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$")], ...] = ("US",)
    """Countries whose phone numbers are redacted even without a country code."""


EngineUrl = Annotated[
    str, StringConstraints(pattern=r"^((https?|dns\+http)://[^\s/?#@]+/?|unix:///?[^\s]+)$")
]


def _as_tuple(value: object) -> object:
    """A single address is a list of one; null is an empty list."""
    if isinstance(value, list):
        return tuple(value)
    return () if value is None else (value,) if isinstance(value, str) else value


class EngineSettings(Section):
    """The vLLM engine behind the gateway."""

    url: Annotated[tuple[EngineUrl, ...], BeforeValidator(_as_tuple)] = ()
    """Engines that run elsewhere, one or a list: `http://host:port`, `unix:///path`, or
    `dns+http://name:port` for all addresses of a DNS name, resolved again every few seconds. None: an engine
    is started here."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 32
    """Most sequences in a batch."""
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    """Longest context in tokens. None: the model's own, at most 2048 on a CPU."""
    kv_cache_gib: Annotated[int, Field(ge=1)] = 2
    """Memory for the KV cache on a CPU, in GiB. On a GPU vLLM sizes it."""
    enforce_eager: bool | Literal["auto"] = "auto"
    """Run without CUDA graphs and compilation. `auto`: only on a CPU, where they start slowly and gain
    nothing."""
    startup_timeout_s: Seconds = 900.0
    """Longest wait for the engine to be ready."""
    silence_timeout_s: Seconds = 120.0
    """Longest time without an answer from the engine's workers, which answer between two steps. After it the
    engine counts as hanging and is restarted. Must be longer than the longest step."""
    extra_args: tuple[str, ...] = ()
    """More arguments for `vllm serve`, one item each, e.g. `--tensor-parallel-size=2`."""
    environment: Mapping[VariableName, str | None] = Field(default_factory=dict)
    """More environment variables for an engine that is started here, e.g. `{LMCACHE_CONFIG_FILE:
    /etc/lmcache.yaml}`; null passes on the gateway's own value. By default the engine gets only the variables
    that vLLM, torch and the devices need, and none named like a secret (KEY, TOKEN …)."""

    @model_validator(mode="after")
    def _urls_differ(self) -> Self:
        if twice := sorted({url for url in self.url if self.url.count(url) > 1}):
            raise ValueError(f"url: {twice[0]!r} is given twice; keep one")
        return self

    @model_validator(mode="after")
    def _check_environment(self) -> Self:
        if guarded := sorted(GUARDED_ENGINE_VARIABLES & self.environment.keys()):
            raise ValueError(f"environment.{guarded[0]} is given, but the guard sets it itself")
        return self

    @model_validator(mode="after")
    def _check_extra_args(self) -> Self:
        for index, argument in enumerate(self.extra_args):
            if argument.split("=", 1)[0].replace("_", "-") in GUARDED_ENGINE_ARGS:
                raise ValueError(f"extra_args[{index}] = {argument!r}, but the guard sets that itself")
        return self


class PathSettings(Section):
    """Folders that commands read and write."""

    policies: Path = Field(default_factory=lambda: _shipped("policies"))
    """Folder of policies: every `*.yaml` in it, and every `policy.yaml` below. Default: `policies` in the
    working directory, else in the checkout."""
    artifacts: Path = Field(default_factory=lambda: _shipped("sae_artifacts"))
    """Folder of dictionaries and adapters. Default: `sae_artifacts` in the working directory, else in the
    checkout."""
    plans: Path | None = None
    """Folder for plans of `mechctl policy compile` without `-o`. None: no plan is written."""
    keys: Path | None = None
    """File of API keys, written by `mechctl keys add`. With it, both listeners require a key. None: anybody
    who reaches the gateway may use it, and it listens on this machine only."""
    transcripts: Path | None = None
    """Folder of tenants' kept requests. Default: `transcripts` under `paths.state`."""
    state: Path = Field(default_factory=user_state_dir)
    """Folder for what must survive a restart: used budgets, and circuits that were found. Default:
    `interpretops` in the user's state folder."""


class Settings(Section):
    """All settings; `interpretops.settings.load_settings` makes them."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    """The language model that is served and studied."""
    cache: CacheSettings = Field(default_factory=CacheSettings)
    """Where files are kept that can be made again."""
    store: StoreSettings = Field(default_factory=StoreSettings)
    """Where records are stored beside the local disk."""
    runtime: RuntimeSettings = Field(default_factory=RuntimeSettings)
    """What steering may cost."""
    compliance: ComplianceSettings = Field(default_factory=ComplianceSettings)
    """What is kept of the traffic, and for how long."""
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    """The HTTP front end: where it listens and what it bounds."""
    engine: EngineSettings = Field(default_factory=EngineSettings)
    """The vLLM engine behind the gateway."""
    paths: PathSettings = Field(default_factory=PathSettings)
    """Folders that commands read and write."""
    policies: PolicySettings = Field(default_factory=PolicySettings)
    """What a policy revision must show before it serves."""
    audit: AuditSettings = Field(default_factory=AuditSettings)
    """The audit log: which request got which revision, and who changed what."""
    tracing: TracingSettings = Field(default_factory=TracingSettings)
    """OpenTelemetry traces of requests."""
    canary: CanarySettings = Field(default_factory=CanarySettings)
    """Prompts that the gateway itself sends, with and without each policy."""
    limits: SharedLimits = Field(default_factory=SharedLimits)
    """Limits that several gateways share."""
    tenants: tuple[Tenant, ...] = ()
    """Who uses the gateway, by key, and how much. Without keys, the limits of a tenant named `anonymous`
    apply to everybody."""
    aliases: tuple[Alias, ...] = ()
    """More names for the model in clients' requests; bindings can match them."""
    bindings: tuple[Binding, ...] = (Binding(policy="*"),)
    """Which policy applies to whom. Of all bindings that match, `mandatory` wins over the caller's choice,
    and that wins over `default`; the first of several defaults counts. Default: callers may choose any loaded
    policy, and none applies by itself."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        check_names(self.tenants, self.aliases, self.bindings, with_keys=self.paths.keys is not None)
        return self

    @model_validator(mode="after")
    def _kept_requests_may_be_kept(self) -> Self:
        asking = [tenant.id for tenant in self.tenants if tenant.transcripts is not None]
        if asking and self.compliance.retention_days == 0:
            raise ValueError(
                f"compliance.retention_days = 0 keeps nothing, but tenant {asking[0]!r} has transcripts; "
                "give it days, or take the transcripts out"
            )
        return self

    @property
    def transcripts_dir(self) -> Path:
        """Where kept requests are."""
        return self.paths.transcripts or self.paths.state / "transcripts"

    @property
    def circuits_dir(self) -> Path:
        """Where found circuits are, by id."""
        return self.paths.state / "circuits"
