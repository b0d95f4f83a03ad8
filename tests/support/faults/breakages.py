"""The faults: each breaks one part, waits until the effect shows, and repairs it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from faults.hostile import disconnect, send_malformed
from faults.marker import POLICY
from faults.stand import FAKETIME, Stand
from faults.traffic import Traffic

_HUNG_S: Final = 4.0
"""Shorter than the time after which the gateway considers an engine lost."""


@dataclass(frozen=True)
class Breakage:
    """One fault."""

    name: str
    how: str
    break_and_mend: Callable[[Stand, Traffic], Awaitable[None]]
    needs_own_engine: bool = False


async def _kill(stand: Stand, part: str) -> None:
    killed = stand.engine(part)
    killed.kill()

    async def lost() -> bool:
        return not await stand.ready()

    await stand.until(lost, "readiness is lost with the engine")
    await stand.until(stand.ready, "another engine is proven", 240)


async def engine_killed(stand: Stand, _traffic: Traffic) -> None:
    await _kill(stand, "server")


async def worker_killed(stand: Stand, _traffic: Traffic) -> None:
    await _kill(stand, "core")


async def _stop_for_a_while(stand: Stand, part: str) -> None:
    process = stand.engine(part)
    process.suspend()
    try:
        await asyncio.sleep(_HUNG_S)
    finally:
        process.resume()


async def engine_hung(stand: Stand, _traffic: Traffic) -> None:
    await _stop_for_a_while(stand, "server")


async def worker_hung(stand: Stand, _traffic: Traffic) -> None:
    await _stop_for_a_while(stand, "core")


async def _stop_for_good(stand: Stand, part: str) -> None:
    stand.engine(part).suspend()

    async def given_up() -> bool:
        return not await stand.ready()

    await stand.until(given_up, f"the engine whose {part} hangs is given up", 120)
    await stand.until(stand.ready, "another engine is proven", 240)


async def engine_hung_for_good(stand: Stand, _traffic: Traffic) -> None:
    await _stop_for_good(stand, "server")


async def worker_hung_for_good(stand: Stand, _traffic: Traffic) -> None:
    await _stop_for_good(stand, "core")


async def plan_corrupted(stand: Stand, traffic: Traffic) -> None:
    vector, policy = (stand.policies / f"{POLICY}.{suffix}" for suffix in ("safetensors", "yaml"))
    numbers, text = vector.read_bytes(), policy.read_text()
    for path, damaged in (
        (policy, text[: len(text) // 2].encode()),
        (policy, b"\0" * 4096),
        (vector, numbers[:-100]),
    ):
        whole = path.read_bytes()
        path.write_bytes(damaged)
        if path == vector:
            # A vector is read together with the policy that names it.
            policy.write_text(text + "# again\n")

        async def reported() -> bool:
            return bool(await stand.policy_error()) or await stand.metric("interpretops_policy_broken") > 0

        await stand.until(reported, f"{path.name} is reported to be broken")
        await traffic.steered_again()
        path.write_bytes(whole)
        policy.write_text(text)

        async def mended() -> bool:
            return not await stand.policy_error()

        await stand.until(mended, f"{path.name} is whole again")


async def disk_full(stand: Stand, traffic: Traffic) -> None:
    with stand.full_disk():
        await traffic.refused_for("audit_unavailable")
        steered = traffic.counts["steered"]
        for _ in range(10):
            await traffic.refused_for("audit_unavailable")
        # Requests in progress when the disk filled up.
        assert traffic.counts["steered"] <= steered + 4
    await traffic.steered_again()


async def folder_gone(stand: Stand, traffic: Traffic) -> None:
    aside = stand.folder / "aside"

    async def missed() -> bool:
        return await stand.metric("interpretops_policy_sources_broken") > 0

    async def found() -> bool:
        return not await missed()

    stand.policies.rename(aside)
    await stand.until(missed, "the folder is reported to be gone")
    await traffic.steered_again()
    aside.rename(stand.policies)
    await stand.until(found, "the folder is there again")


async def clock_jump(stand: Stand, traffic: Traffic) -> None:
    for shift in ("+2d", "-40d", "+0"):
        stand.set_clock(shift)
        # The first answers may have been in progress when the clock jumped.
        await traffic.steered_again()
        await traffic.steered_again()


def breakages(*, malformed: int, disconnects: int) -> list[Breakage]:
    """All of them, in order."""

    async def send(stand: Stand, traffic: Traffic) -> None:
        await send_malformed(stand, traffic, malformed)

    async def leave(stand: Stand, traffic: Traffic) -> None:
        await disconnect(stand, traffic, disconnects)

    own = True
    every = [
        Breakage(f"{malformed} malformed requests", "smuggling, wrong bodies, random damage", send),
        Breakage(f"{disconnects} disconnects", "connections reset in four phases", leave),
        Breakage("plan files corrupted", "policy cut, zeroed; vector cut; each mended", plan_corrupted),
        Breakage("disk full", "audit log and budgets on a tmpfs that is filled up", disk_full),
        Breakage("policies folder gone", "renamed, and back after a few seconds", folder_gone),
        Breakage("engine hung", f"SIGSTOP for {_HUNG_S:g} s, then SIGCONT: API server", engine_hung),
        Breakage("worker hung", f"SIGSTOP for {_HUNG_S:g} s, then SIGCONT: core and worker", worker_hung),
        Breakage("engine hung for good", "SIGSTOP: API server", engine_hung_for_good, own),
        Breakage("worker hung for good", "SIGSTOP: core and worker", worker_hung_for_good, own),
        Breakage("engine killed", "SIGKILL: API server", engine_killed, own),
        Breakage("worker killed", "SIGKILL: core, which holds the worker", worker_killed, own),
    ]
    if FAKETIME.exists():
        jump = Breakage("clock jump", "gateway's wall clock +2 d, -40 d, back (libfaketime)", clock_jump)
        every.insert(5, jump)
    return every
