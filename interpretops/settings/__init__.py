"""The settings of every command: one schema, read from a file, the environment and flags."""

from interpretops.settings.access import Alias, Binding, Limits, Match, Tenant
from interpretops.settings.environment import CONFIG_VARIABLE, ENV_PREFIX
from interpretops.settings.gateway import AuditSettings, GatewaySettings
from interpretops.settings.load import NO_EFFECT_YET, load_settings
from interpretops.settings.schema import EngineSettings, ModelSettings, Settings

__all__ = [
    "CONFIG_VARIABLE",
    "ENV_PREFIX",
    "NO_EFFECT_YET",
    "Alias",
    "AuditSettings",
    "Binding",
    "EngineSettings",
    "GatewaySettings",
    "Limits",
    "Match",
    "ModelSettings",
    "Settings",
    "Tenant",
    "load_settings",
]
