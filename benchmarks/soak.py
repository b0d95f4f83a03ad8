"""Whether resources grow: the real engine and gateway under mixed load and reloads, for half an hour.

    python -m benchmarks.soak [--minutes 30] [--workers 8] [--reload-every 20] [--json]

Workers send chats, streamed or not, under policies chosen by header, under a mandatory one and under none,
and abandon one stream in ten after its first bytes. A policy file changes every 20 s and is reloaded. Every
answer is checked against the requested policy, the revisions in force while it was generated, and its
receipt. Memory, file descriptors, threads, table rows and asyncio tasks are measured at rest before and
after, and every ten seconds; the slope is that of the second half. Latencies of the first and last third are
compared.

It fails (status 1) if an answer is not proven, a request is refused, or a resource grows. It does not cover
more than one engine, long prompts, or a GPU. Load, gateway and engine share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

from benchmarks.gateway import free_port
from benchmarks.processes import argument, children, holds
from benchmarks.record import commit, machine, write
from benchmarks.soak_load import SHIPPED, Load, out_of_turn
from interpretops.engine_api import ATTEST_ROUTE, Attestation
from interpretops.records.api_keys import make_key, write_keys

ROOT = Path(__file__).parents[1]
SAMPLE_EVERY_S = 10.0
GROWN = {"memory_mb": 24.0, "fds": 8.0, "threads": 2.0, "rows": 0.0, "tasks": 4.0}
"""Largest allowed growth at rest between start and end."""
P99_RATIO = 1.5
"""Largest allowed ratio of the last third's p99 to the first third's."""


@dataclass
class Soak:
    """The services under load, and their measured resources."""

    load: Load
    process: subprocess.Popen[bytes]
    samples: list[dict[str, float]] = field(default_factory=list)

    async def sample(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """Measure the gateway's and the engine's resources."""
        pid = self.process.pid
        gateway, engine = holds([pid]), holds(children(pid))
        socket = next(path for one in children(pid) if (path := argument(one, "--uds")))
        async with session.get(self.load.admin + "/metrics", headers=self.load.operator) as answer:
            shown = dict(re.findall(r"^(interpretops_\w+) (\S+)$", await answer.text(), re.MULTILINE))
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as private,
            private.get(f"http://engine{ATTEST_ROUTE}") as answer,
        ):
            (core,) = Attestation.read(await answer.read()).engines
        return {
            **{f"gateway_{name}": value for name, value in gateway.items()},
            **{f"engine_{name}": value for name, value in engine.items()},
            "gateway_tasks": float(shown["interpretops_gateway_tasks"]),
            "in_flight": float(shown["interpretops_requests_in_flight"]),
            "engine_rows": float(max(len(rank.resident) for rank in core.ranks)),
        }

    async def rest(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """A sample when nothing runs and idle connections are closed."""
        ends = time.monotonic() + 60
        while True:
            await asyncio.sleep(5)
            found = await self.sample(session)
            if found["in_flight"] == 0:
                return found
            if time.monotonic() > ends:
                raise RuntimeError(f"a minute after the load {found['in_flight']:g} requests are in flight")

    async def run(self, seconds: float, workers: int, reload_every_s: float) -> dict[str, Any]:
        """Run load with reloads and samples; returns the figures."""
        control = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        async with control:
            await self._load(control, min(60.0, seconds / 4), workers, reload_every_s)
            before = await self.rest(control)
            self.load.answers.clear()
            self.samples.clear()
            began = time.monotonic()
            await self._load(control, seconds, workers, reload_every_s)
            lasted = time.monotonic() - began
            after = await self.rest(control)
        return summarise(self, before, after, began, lasted)

    async def _load(
        self, control: aiohttp.ClientSession, seconds: float, workers: int, reload_every_s: float
    ) -> None:
        ends = time.monotonic() + seconds
        timeout = aiohttp.ClientTimeout(total=120)

        async def work(seed: int) -> None:
            rng = random.Random(seed)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                while time.monotonic() < ends:
                    await self.load.chat(session, rng)

        async def turning() -> None:
            while time.monotonic() < ends:
                await asyncio.sleep(min(reload_every_s, max(0.0, ends - time.monotonic())))
                await self.load.turn(control, len(self.load.turns))

        async def sampling() -> None:
            while time.monotonic() < ends:
                found = await self.sample(control)
                self.samples.append({"at": time.monotonic(), **found})
                await asyncio.sleep(min(SAMPLE_EVERY_S, max(0.0, ends - time.monotonic())))

        async with asyncio.TaskGroup() as tasks:
            for seed in range(workers):
                tasks.create_task(work(seed))
            tasks.create_task(turning())
            tasks.create_task(sampling())


def summarise(
    soak: Soak, before: dict[str, float], after: dict[str, float], began: float, lasted: float
) -> dict[str, Any]:
    """Figures and problems; `flat` and `stable` say whether the requirements hold."""
    faults = [f"{answer.asked}: {answer.fault}" for answer in soak.load.answers if answer.fault]
    faults += [fault for answer in soak.load.answers if (fault := out_of_turn(soak.load.turns, answer))]
    whole = [answer for answer in soak.load.answers if not answer.left and not answer.fault]
    thirds = [
        [answer for answer in whole if part <= (answer.began - began) / lasted * 3 < part + 1]
        for part in range(3)
    ]
    latencies = {
        "whole": [[one.ended - one.began for one in third if not one.streamed] for third in thirds],
        "first_event": [
            [one.first_event - one.began for one in third if one.first_event] for third in thirds
        ],
    }
    held = {name: {"before": before[name], "after": after[name]} for name in before if name != "in_flight"}
    late = [sample for sample in soak.samples if sample["at"] - began > lasted / 2]
    for name, figures in held.items():
        figures["per_hour"] = _slope([(each["at"] / 3600, each[name]) for each in late])
    grown = {
        name: figures["after"] - figures["before"]
        for name, figures in held.items()
        if figures["after"] - figures["before"] > GROWN[name.split("_", 1)[1]]
    }
    p99 = {
        name: [
            round(statistics.quantiles(third, n=100)[98], 3) if len(third) > 1 else None for third in parts
        ]
        for name, parts in latencies.items()
    }
    ratios = {name: parts[2] / parts[0] for name, parts in p99.items() if parts[0] and parts[2]}
    return {
        "minutes": round(lasted / 60, 1),
        "requests": len(soak.load.answers),
        "proven": len(whole),
        "hung_up": sum(answer.left for answer in soak.load.answers),
        "faults": len(faults),
        "first_faults": faults[:5],
        "reloads": len(soak.load.turns),
        "reload_s_p50": round(statistics.median(soak.load.reload_s), 3),
        "reload_s_max": round(max(soak.load.reload_s), 3),
        "held": {
            name: {key: round(value, 1) for key, value in figures.items()} for name, figures in held.items()
        },
        "grown": {name: round(value, 1) for name, value in grown.items()},
        "p99_s_by_third": p99,
        "p99_last_over_first": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "flat": not grown,
        "stable": all(ratio <= P99_RATIO for ratio in ratios.values()),
    }


def _slope(points: list[tuple[float, float]]) -> float:
    """Slope of the least-squares line."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def start(folder: Path) -> Soak:
    """Start `mechctl serve` with keys, audit log, the shipped policies and one that keeps changing."""
    policies = folder / "policies"
    policies.mkdir()
    for name in SHIPPED:
        (policies / f"{name}.yaml").write_bytes((ROOT / "policies" / f"{name}.yaml").read_bytes())
    made = {
        "free": make_key(tenant="free", role=None, name="", expires=None),
        "bound": make_key(tenant="bound", role=None, name="", expires=None),
        "operator": make_key(tenant=None, role="operator", name="", expires=None),
    }
    write_keys(folder / "keys.yaml", tuple(kept for _, kept in made.values()))
    ports = free_port(), free_port()
    settings = {
        "paths": {
            "policies": str(policies),
            "artifacts": str(ROOT / "sae_artifacts"),
            "keys": str(folder / "keys.yaml"),
            "state": str(folder / "state"),
        },
        "engine": {"kv_cache_gib": 1},
        "gateway": {"port": ports[0], "admin_port": ports[1]},
        "audit": {"path": str(folder / "audit.jsonl")},
        "tenants": [{"id": "free"}, {"id": "bound"}],
        "bindings": [
            {"match": {"tenant": "bound"}, "policy": "jailbreak", "mode": "mandatory"},
            {"policy": "*"},
        ],
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "mechctl.main", "serve", "--config", str(folder / "config.yaml")]
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    url, admin = urls
    return Soak(Load(url, admin, {name: key for name, (key, _) in made.items()}, policies), process)


async def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start, wait for the engine, load."""
    under = start(folder)
    try:
        ends = time.monotonic() + 600
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(OSError):
                    async with session.get(under.load.url + "/readyz") as answer:
                        if answer.status == 200:
                            break
                if under.process.poll() is not None or time.monotonic() > ends:
                    raise RuntimeError((folder / "gateway.log").read_text()[-2000:])
                await asyncio.sleep(0.5)
            await under.load.turn(session, 0)
        return await under.run(options.minutes * 60, options.workers, options.reload_every)
    finally:
        under.process.terminate()
        under.process.wait(60)


def main() -> None:
    """Run, print and write the result; the exit status says whether everything held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long the load lasts, after a warm-up")
    parser.add_argument("--workers", type=int, default=8, help="concurrent requests")
    parser.add_argument("--reload-every", type=float, default=20, help="seconds between reloads")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line at the end")
    options = parser.parse_args()
    # When stopped, still stop the started processes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("soaking"):
        measured = asyncio.run(soak(options, Path(folder)))
    result = {
        **measured,
        "workers": options.workers,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "commit": commit(),
    }
    for name, value in result.items():
        print(f"{name:20} {value}")
    write("soak", result)
    if options.json:
        print(json.dumps(result))
    sys.exit(0 if not result["faults"] and result["flat"] and result["stable"] else 1)


if __name__ == "__main__":
    main()
