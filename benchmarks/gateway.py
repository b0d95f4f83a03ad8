"""The gateway's cost: requests at fixed rates to an engine that answers at once, direct and via the gateway.

    python -m benchmarks.gateway [--rate 500] [--seconds 8] [--rounds 5] [--json]

The gateway runs as users run it (`mechctl serve`), in one process, with keys, a binding, metrics, audit log
and a receipt for every answer. Load is open-loop: requests are sent on schedule whether or not earlier ones
have finished, and latency counts from the scheduled time. Each round sends the same load direct, through a
bare aiohttp relay and through the gateway, in a new order. The added latency is computed within the round;
the median over rounds is reported with its spread. A second part requests streams of 64 events, and compares
processor time per stream with the bare relay's. `rps_per_core` is requests per second of processor time used
by the gateway, not a driven rate.

Limits: load generator, engine and gateway share the machine, so on few cores p99 includes their scheduling;
there is no network.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.progress import Progress

from benchmarks.record import commit, machine, write
from interpretops.records.api_keys import make_key, write_keys
from proxy.process.open_file_limit import raise_limit

WAYS = ("direct", "relay", "gateway")
BODY = {"model": "mock", "messages": [{"role": "user", "content": "Tell me something about the sea. " * 8}]}
POLICY = """meta: {id: calm}
interventions:
  - {type: head_scale, selector: {layer: 1, heads: [0]}, scale: 0.5}
"""


_MAX_SECONDS_BEHIND = 5
"""Ratio of requests in progress to the rate above which only the queue is measured."""


class NotCarriedError(RuntimeError):
    """The machine cannot sustain the requested rate."""


@dataclass
class Server:
    """A server process."""

    process: subprocess.Popen[bytes]
    url: str
    headers: dict[str, str]

    def cpu_s(self) -> float:
        """Processor time used so far."""
        used = psutil.Process(self.process.pid).cpu_times()
        return float(used.user + used.system)

    def rss_mb(self) -> float:
        """Memory in use."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)


def free_port() -> int:
    """An unused port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(folder: Path) -> dict[str, Server]:
    """Engine, relay and gateway."""
    ports = [free_port() for _ in range(4)]
    mock = [sys.executable, "-m", "benchmarks.mock_engine"]
    engine = f"http://127.0.0.1:{ports[0]}"
    (folder / "policies").mkdir()
    (folder / "policies" / "calm.yaml").write_text(POLICY)
    key, kept = make_key(tenant="team", role=None, name="benchmark", expires=None)
    write_keys(folder / "keys.yaml", (kept,))
    settings = {
        "paths": {name: str(folder / name) for name in ("policies", "artifacts", "state")}
        | {"keys": str(folder / "keys.yaml")},
        "engine": {"url": engine},
        "gateway": {"port": ports[2], "admin_port": ports[3]},
        "audit": {"path": str(folder / "audit.jsonl")},
        "tenants": [{"id": "team"}],
        "bindings": [{"match": {"tenant": "team"}, "policy": "calm", "mode": "mandatory"}],
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    log = (folder / "gateway.log").open("wb")
    started = {
        "direct": ([*mock, "engine", str(ports[0])], engine, {}),
        "relay": ([*mock, "relay", str(ports[1]), engine], f"http://127.0.0.1:{ports[1]}", {}),
        "gateway": (
            [sys.executable, "-m", "mechctl.main", "serve", "--config", str(folder / "config.yaml")],
            f"http://127.0.0.1:{ports[2]}",
            {"Authorization": f"Bearer {key}"},
        ),
    }
    return {
        name: Server(subprocess.Popen(command, stdout=log, stderr=log), url, headers)
        for name, (command, url, headers) in started.items()
    }


async def ready(session: aiohttp.ClientSession, servers: dict[str, Server]) -> None:
    """Wait until all three answer."""
    waiting = {"direct": "/health", "relay": "/health", "gateway": "/readyz"}
    ends = time.monotonic() + 60
    while waiting:
        for name, path in list(waiting.items()):
            try:
                async with session.get(servers[name].url + path) as answer:
                    if answer.status == 200:
                        del waiting[name]
            except OSError:
                pass
        if time.monotonic() > ends or any(server.process.poll() is not None for server in servers.values()):
            raise RuntimeError(f"{', '.join(waiting)} did not start")
        await asyncio.sleep(0.05)


async def load(
    session: aiohttp.ClientSession, server: Server, rate: float, seconds: float, *, stream: bool
) -> list[float]:
    """Latencies in seconds of requests sent at a fixed rate, each checked to be complete and steered."""
    body = json.dumps(BODY | ({"stream": True} if stream else {})).encode()
    headers = {"Content-Type": "application/json", **server.headers}
    begin = time.perf_counter() + 0.05

    async def one(due: float) -> float:
        async with session.post(f"{server.url}/v1/chat/completions", data=body, headers=headers) as answer:
            text = await answer.read()
            if answer.status != 200 or (stream and not text.endswith(b"data: [DONE]\n\n")):
                raise RuntimeError(f"status {answer.status}: {text[-300:]!r}")
            if server.headers and not answer.headers["X-Steering-Policy"].startswith("calm@"):
                raise RuntimeError("an answer without its policy")
        return time.perf_counter() - due

    tasks: list[asyncio.Task[float]] = []
    unanswered: set[asyncio.Task[float]] = set()
    try:
        for index in range(int(rate * seconds)):
            due = begin + index / rate
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            if len(unanswered) > _MAX_SECONDS_BEHIND * rate:
                raise NotCarriedError(
                    f"{len(unanswered)} requests are in flight at {server.url}: this machine does not carry "
                    f"{rate:g} a second with load generator, engine and gateway together; give a lower rate"
                )
            task = asyncio.create_task(one(due))
            unanswered.add(task)
            task.add_done_callback(unanswered.discard)
            tasks.append(task)
        return list(await asyncio.gather(*tasks))
    finally:
        for task in unanswered:
            task.cancel()


async def measure(options: argparse.Namespace, progress: Progress, folder: Path) -> dict[str, Any]:
    """Run both parts; returns the result as written to disk."""
    servers = start(folder)
    rng = random.Random(0)
    rounds: list[dict[str, dict[str, float]]] = []
    streams: list[dict[str, float]] = []
    try:
        # Shorter than the servers' keep-alive, or a request could meet a closing connection.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15)
        async with aiohttp.ClientSession(connector=connector) as session:
            await ready(session, servers)
            for server in servers.values():
                await load(session, server, options.rate / 4, 2, stream=False)
            task = progress.add_task("rounds", total=options.rounds * 6)
            for _ in range(options.rounds):
                found: dict[str, dict[str, float]] = {}
                for way in rng.sample(WAYS, 3):
                    before = servers[way].cpu_s()
                    latencies = await load(session, servers[way], options.rate, options.seconds, stream=False)
                    cpu = (servers[way].cpu_s() - before) / len(latencies)
                    cuts = statistics.quantiles(latencies, n=100)
                    found[way] = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "cpu": cpu}
                    progress.advance(task)
                rounds.append(found)
                per_stream = {}
                for way in rng.sample(WAYS, 3):
                    before = servers[way].cpu_s()
                    latencies = await load(
                        session, servers[way], options.streams, options.seconds, stream=True
                    )
                    per_stream[way] = (servers[way].cpu_s() - before) / len(latencies)
                    progress.advance(task)
                streams.append(per_stream)
            rss = servers["gateway"].rss_mb()
    finally:
        for server in servers.values():
            server.process.terminate()
        for server in servers.values():
            server.process.wait(30)
    return summarise(rounds, streams, rss)


def summarise(
    rounds: list[dict[str, dict[str, float]]], streams: list[dict[str, float]], rss: float
) -> dict[str, Any]:
    """Median over rounds of the gateway's added latency in ms, with the lowest and highest round."""
    result: dict[str, Any] = {}
    for name in ("p50", "p95", "p99"):
        for way in ("relay", "gateway"):
            added = sorted(1e3 * (one[way][name] - one["direct"][name]) for one in rounds)
            prefix = "added" if way == "gateway" else "relay_added"
            result[f"{prefix}_{name}_ms"] = round(statistics.median(added), 3)
            result[f"{prefix}_{name}_ms_range"] = [round(added[0], 3), round(added[-1], 3)]
    for way in ("relay", "gateway"):
        result[f"{way}_cpu_us"] = round(1e6 * statistics.median(one[way]["cpu"] for one in rounds), 1)
        result[f"{way}_stream_cpu_us"] = round(1e6 * statistics.median(one[way] for one in streams), 1)
    result["rps_per_core"] = round(1e6 / result["gateway_cpu_us"])
    result["relay_rps_per_core"] = round(1e6 / result["relay_cpu_us"])
    result["sse_cost_ratio"] = round(statistics.median(one["gateway"] / one["relay"] for one in streams), 3)
    result["rss_mb"] = round(rss, 1)
    return result


def main() -> None:
    """Measure, show, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", type=float, default=500, help="requests a second")
    parser.add_argument("--streams", type=float, default=30, help="streams of 64 events a second")
    parser.add_argument("--seconds", type=float, default=8, help="how long each load lasts")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line at the end")
    options = parser.parse_args()
    raise_limit()
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        try:
            measured = asyncio.run(measure(options, progress, Path(folder)))
        except (RuntimeError, aiohttp.ClientError, OSError) as error:
            log_tail = (Path(folder) / "gateway.log").read_text(errors="replace")[-2000:]
            sys.exit(f"{log_tail}\nbenchmark: {error!r}")
    result = {
        **measured,
        "rate": options.rate,
        "streams": options.streams,
        "seconds": options.seconds,
        "n": options.rounds,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "commit": commit(),
    }
    for name, value in result.items():
        print(f"{name:24} {value}")
    write("gateway", result)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
