"""Runs all checks in the order in which `mechctl serve` needs the parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

from interpretops.errors import InterpretOpsError
from interpretops.model.spec import read_model_spec
from interpretops.plan import ModelSpec
from interpretops.settings import Settings
from proxy.doctor.access import check_keys, check_listeners
from proxy.doctor.engine import check_engine, check_engines_elsewhere
from proxy.doctor.finding import Finding, fault, ok
from proxy.doctor.machine import check_disk, check_machine
from proxy.doctor.policies import check_policies
from proxy.doctor.stores import check_stores
from proxy.engines.model_folder import find_model


async def examine(settings: Settings, progress: Callable[[str], None]) -> AsyncIterator[Finding]:
    """Run all checks; yields each finding as soon as it is known.

    Starts no engine, and writes nothing except the default model if it is missing. ``progress`` gets lines
    about slow steps.
    """
    for finding in check_disk(settings):
        yield finding
    model: ModelSpec | None = None
    if settings.engine.url:
        async for finding, spec in check_engines_elsewhere(settings):
            model = model or spec
            yield finding
    else:
        folder, found = await _find_model(settings, progress)
        for finding in found:
            yield finding
        for finding in [*check_machine(settings, folder), *check_engine(settings, folder)]:
            yield finding
        model = None if folder is None else read_model_spec(folder)
    for finding in [*check_listeners(settings), *check_keys(settings)]:
        yield finding
    for finding in check_policies(settings, model):
        yield finding
    async for finding in check_stores(settings):
        yield finding


async def _find_model(
    settings: Settings, progress: Callable[[str], None]
) -> tuple[Path | None, list[Finding]]:
    try:
        folder = await find_model(settings, progress)
        spec = read_model_spec(folder)
    except InterpretOpsError as error:
        return None, fault("model", error)
    text = (
        f"{spec.name}: {spec.architecture}, {spec.num_layers} layers, width {spec.hidden_size}, in {folder}"
    )
    return folder, [ok("model", text)]
