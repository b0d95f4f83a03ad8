"""Whether this machine has the memory, CPU and disk space that the settings need."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from interpretops.errors import InterpretOpsError
from interpretops.machine import machine_name
from interpretops.settings import Settings
from proxy.doctor.finding import Finding, fault, ok, warning
from proxy.engines.command import available_memory_bytes, check_memory, engine_runs_on_cpu, slow_format

_GIB = 2**30
_MIN_FREE_GIB = 1.0


def check_machine(settings: Settings, model: Path | None) -> list[Finding]:
    """Check processor, memory and number format for a local engine."""
    found: list[Finding] = []
    if model is not None:
        try:
            check_memory(settings, model)
        except InterpretOpsError as error:
            found += fault("memory", error)
        else:
            if engine_runs_on_cpu(settings):
                found.append(ok("memory", f"{available_memory_bytes() / _GIB:.1f} GiB are free"))
    slow = slow_format(settings)
    name = machine_name()
    found.append(ok("machine", name) if slow is None else warning("machine", f"{name}: {slow}"))
    return found


def check_disk(settings: Settings) -> list[Finding]:
    """Check that the folders the gateway writes to are writable and have space."""
    folders = {"cache.dir": settings.cache.dir, "paths.state": settings.paths.state}
    if settings.audit.path is not None:
        folders["audit.path"] = settings.audit.path.parent
    if settings.paths.transcripts is not None:
        folders["paths.transcripts"] = settings.paths.transcripts
    return [_check_folder(field, folder.expanduser()) for field, folder in folders.items()]


def _check_folder(field: str, folder: Path) -> Finding:
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        return fault(field, f"{field} = {folder}, but {there} is not a folder; choose another")[0]
    if not os.access(there, os.W_OK | os.X_OK):
        return fault(field, f"{field} = {folder}, but {there} is not writable; change its owner")[0]
    free = shutil.disk_usage(there).free / _GIB
    if free < _MIN_FREE_GIB:
        return warning(field, f"{folder}: only {free:.1f} GiB free; make room, or choose another folder")
    return ok(field, f"{folder}: {free:.0f} GiB free")
