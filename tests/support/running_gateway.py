"""A running gateway as the tests of `proxy` see it, and the types of their fixtures."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiohttp import ClientSession
from fake_engine import MODEL

from proxy.gateway import Apps
from proxy.http.server import Runner


@dataclass
class Front:
    """A running gateway: an HTTP session for each listener, and access to its internals."""

    public: ClientSession
    admin: ClientSession
    apps: Apps
    policies: Path
    log: list[Any]
    runners: list[Runner]

    async def chat(self, *, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, Any, Any]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        async with self.public.post("/v1/chat/completions", json=body, headers=headers) as answer:
            text = await answer.text()
            return answer.status, answer.headers, text if body.get("stream") else json.loads(text)

    async def policy_list(self) -> Any:
        async with self.admin.get("/admin/policies") as answer:
            return await answer.json()

    async def policy_error(self, policy: str) -> str | None:
        listed = (await self.policy_list())["policies"]
        error: str | None = next(entry["error"] for entry in listed if entry["id"] == policy)
        return error

    async def engine_ready(self) -> bool:
        async with self.public.get("/readyz") as answer:
            return answer.status == 200


def write_policy(folder: Path, name: str, scale: float = 0.5, heads: str = "[0]") -> Path:
    """Write a policy that needs no dictionary."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"meta: {{id: {name}}}\ninterventions:\n"
        f"  - {{type: head_scale, selector: {{layer: 1, heads: {heads}}}, scale: {scale}}}\n"
    )
    return path


Start = Callable[..., Awaitable[Front]]
"""`start(*policies, wait=True, **sections)` starts a gateway with policies of these names. ``sections`` are
settings by dotted name; a typed signature would not let a dictionary of them be passed."""


class Until(Protocol):
    """Waits until an async condition holds."""

    async def __call__(self, condition: Callable[[], Awaitable[object]], timeout_s: float = 10) -> None: ...


class PolicyWriter(Protocol):
    """Writes `<name>.yaml`, a policy that needs no dictionary, and returns its path."""

    def __call__(self, folder: Path, name: str, scale: float = 0.5, heads: str = "[0]") -> Path: ...
