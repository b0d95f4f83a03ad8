"""The gateway's services start in one order and end in reverse, whatever fails."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import structlog

from interpretops.settings import load_settings
from proxy.gateway import make_app
from proxy.services import Service, Services


class _Recorded(Services):
    """Three services that write down their start and end; the second fails to end."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def in_order(self) -> list[Service]:
        return [self._service(name) for name in ("first", "second", "third")]

    def _service(self, name: str) -> Service:
        @asynccontextmanager
        async def service() -> AsyncIterator[None]:
            self.events.append(f"start {name}")
            try:
                yield
            finally:
                self.events.append(f"end {name}")
                if name == "second":
                    raise OSError("disk full")

        return service


async def test_service_that_fails_to_end_keeps_no_other_from_ending() -> None:
    """All services end in reverse order, and the failure is still raised."""
    services = _Recorded()
    with pytest.raises(OSError, match="disk full"):
        async with services.running():
            services.events.append("serve")
    assert services.events == [
        *("start first", "start second", "start third", "serve"),
        *("end third", "end second", "end first"),
    ]


def test_audit_log_outlives_all_and_accounts_are_settled_before_the_engines_go(tmp_path: Path) -> None:
    """What ends may still be recorded, and receipts can be fetched while requests are charged."""
    overrides = {"audit.path": tmp_path / "audit.jsonl", "paths.policies": tmp_path, "paths.state": tmp_path}
    settings = load_settings(None, overrides, {})
    apps = make_app(settings, _no_engine, structlog.get_logger())
    names = [service.__name__.strip("_") for service in apps.services.in_order()]
    assert names[0] == "audit"
    assert names.index("engines") < names.index("usage_counters")


def _no_engine(_address: str | None) -> NoReturn:
    raise AssertionError("no engine is started here")
