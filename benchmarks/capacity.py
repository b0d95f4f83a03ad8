"""How many gateways and engines a load needs: from measurements, and by simulation beyond them.

    python -m benchmarks.capacity [--tokens-per-s N --batch N] [--output-tokens 200] [--write docs/scaling.md]

Reads from `benchmarks/results` the gateway's processor time per request and per streamed event
(`gateway.json`), and an engine's tokens per second at batches of 1 and 16 (`steering.json`). Simulates from
these how long requests wait for a gateway's only core, and for a place in a batch when each goes to the
engine with the fewest in progress. Computes the size of tables in bytes. No figure comes from a GPU; pass
your engine's own with `--tokens-per-s` and `--batch`. `--write` updates the tables between the marks in a
document, as `make docs` does.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.record import RESULTS
from interpretops.plan import ModelSpec, Site
from interpretops.steering.plan_bank import PlanBank
from steering_kernels.vllm_plugin.engine_config import EngineOptions

BEGIN, END = "<!-- python -m benchmarks.capacity -->", "<!-- end -->"
WAIT_OF_GATEWAY_S, WAIT_OF_ENGINE_S = 0.005, 1.0
"""Longest p99 wait for a gateway's core, and for a place in a batch."""
REQUESTS = 20_000
"""Requests simulated at each point."""
FIRST = REQUESTS // 10
"""Requests not counted, while the queue fills."""
CELL = 64
"""Engines behind one set of gateways."""


@dataclass(frozen=True)
class Engine:
    """An engine's speed: a step with `b` requests takes `fixed_s + b * each_s` and yields `b` tokens."""

    batch: int
    fixed_s: float
    each_s: float

    def step_s(self, running: int) -> float:
        """Duration of a step with ``running`` requests."""
        return self.fixed_s + running * self.each_s

    @property
    def peak(self) -> float:
        """Tokens a second with a full batch."""
        return self.batch / self.step_s(self.batch)


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def gateway_wait_s(service_s: float, utilisation: float, seed: int = 0) -> float:
    """p99 wait for one core when work of `service_s` arrives at random."""
    rng = random.Random(seed)
    free = now = 0.0
    waits = []
    for _ in range(REQUESTS):
        now += rng.expovariate(utilisation / service_s)
        waits.append(max(0.0, free - now))
        free = max(free, now) + service_s
    return p99(waits[FIRST:])


def engine_wait_s(
    engine: Engine, engines: int, tokens_per_s: float, mean_tokens: int, seed: int = 0
) -> float:
    """p99 wait for a place when each request goes to the engine with the fewest in progress.

    Lengths are geometric. Between an arrival and a completion nothing changes in an engine, so time advances
    in one jump: `progress` counts the tokens that each running request of an engine has received.
    """
    rng = random.Random(seed)
    progress, since = [0.0] * engines, [0.0] * engines
    running: list[list[float]] = [[] for _ in range(engines)]
    """Progress at which each running request of an engine ends."""
    waiting: list[list[tuple[float, int]]] = [[] for _ in range(engines)]
    ends: list[tuple[float, int, int]] = []
    """When an engine's next request ends, and for which state of the engine that holds."""
    state = [0] * engines
    fewest = [(0, index) for index in range(engines)]
    in_flight = [0] * engines
    waits: list[float] = []

    def advance(index: int, now: float) -> None:
        if running[index]:
            progress[index] += (now - since[index]) / engine.step_s(len(running[index]))
        since[index] = now

    def admit(index: int, now: float) -> None:
        while waiting[index] and len(running[index]) < engine.batch:
            arrived, tokens = waiting[index].pop(0)
            waits.append(now - arrived)
            heapq.heappush(running[index], progress[index] + tokens)
        state[index] += 1
        if running[index]:
            left = max(0.0, running[index][0] - progress[index]) * engine.step_s(len(running[index]))
            heapq.heappush(ends, (now + left, index, state[index]))

    arrival = 0.0
    for _ in range(REQUESTS):
        arrival += rng.expovariate(tokens_per_s / mean_tokens)
        while ends and ends[0][0] <= arrival:
            now, index, true_of = heapq.heappop(ends)
            if true_of != state[index]:
                continue
            advance(index, now)
            heapq.heappop(running[index])
            in_flight[index] -= 1
            heapq.heappush(fewest, (in_flight[index], index))
            admit(index, now)
        while fewest[0][0] != in_flight[fewest[0][1]]:
            heapq.heappop(fewest)
        _, index = heapq.heappop(fewest)
        in_flight[index] += 1
        heapq.heappush(fewest, (in_flight[index], index))
        advance(index, arrival)
        tokens = 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean_tokens))
        waiting[index].append((arrival, tokens))
        admit(index, arrival)
    return p99(waits[FIRST:])


def usable_share(engine: Engine, engines: int, mean_tokens: int) -> float:
    """The largest usable share of the engines' peak, in steps of 5 %."""
    low, high = 0, 20
    while high - low > 1:
        part = (low + high) // 2
        wait = engine_wait_s(engine, engines, part / 20 * engines * engine.peak, mean_tokens)
        low, high = (part, high) if wait <= WAIT_OF_ENGINE_S else (low, part)
    return low / 20


def table_mb(width: int) -> float:
    """Megabytes of one edited site's table with the engine's default rows and units."""
    options = EngineOptions()
    spec = ModelSpec("any", "0" * 64, "LlamaForCausalLM", width, 1, 8, 8, width // 8, 32)
    site, device = Site(0, "resid_post"), torch.device("meta")
    bank = PlanBank(
        spec, [site], rows=options.rows, units_per_site=options.units_per_site, requests=1, device=device
    )
    table = bank._table(site)
    held = [value for value in vars(table).values() if isinstance(value, torch.Tensor)]
    held += [column for group in (table.columns, table.indices) for column in group.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held) / 2**20


def table(heading: str, rows: list[tuple[object, ...]]) -> str:
    """A Markdown table; columns of the heading are separated by bars."""
    columns = heading.split(" | ")
    lines = [heading, " | ".join("---" for _ in columns), *(" | ".join(map(str, cells)) for cells in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def measured() -> tuple[float, float, Engine, str]:
    """A gateway's processor time for an answer and for a stream of 64 events; an engine; and a
    description."""
    gateway = json.loads((RESULTS / "gateway.json").read_bytes())
    steering = json.loads((RESULTS / "steering.json").read_bytes())
    one, many = (steering[f"batch_{batch}"]["steered"]["tokens_per_s"] for batch in (1, 16))
    each_s = (16 / many - 1 / one) / 15
    whole_s, stream_s = gateway["gateway_cpu_us"] / 1e6, gateway["gateway_stream_cpu_us"] / 1e6
    summary = (
        f"Measured: a gateway of {gateway['rss_mb']} MB takes {1e3 * whole_s:.2f} ms of processor for a "
        f"whole answer and {1e3 * stream_s:.2f} ms for a stream of 64 events\n({gateway['machine']}, commit "
        f"{gateway['commit']}); an engine gives {one} tokens/s to one request and {many} to sixteen, "
        f"all steered\n({steering['machine']}, commit {steering['commit']})."
    )
    if (RESULTS / "soak.json").exists():
        soak = json.loads((RESULTS / "soak.json").read_bytes())
        summary += (
            f" A reload beside {soak['workers']} requests at a time took {soak['reload_s_p50']} s at\n"
            f"the median and {soak['reload_s_max']} s at most (commit {soak['commit']})."
        )
    return whole_s, stream_s, Engine(16, 1 / one - each_s, each_s), summary + "\n"


def of_another(engine: Engine, tokens_per_s: float, batch: int) -> Engine:
    """An engine with only its peak known: takes over the measured one's fixed share of a step."""
    fixed = engine.fixed_s / engine.step_s(engine.batch)
    step_s = batch / tokens_per_s
    return Engine(batch, step_s * fixed, step_s * (1 - fixed) / batch)


def report(tokens: int, tokens_per_s: float | None, batch: int) -> str:
    """All tables, as in the document, for answers of ``tokens`` tokens."""
    whole_s, stream_s, engine, summary = measured()
    if tokens_per_s is not None:
        engine = of_another(engine, tokens_per_s, batch)
    shares = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    waits = {share: gateway_wait_s(whole_s, share) for share in shares}
    core = max((share for share in shares if waits[share] <= WAIT_OF_GATEWAY_S), default=shares[0])
    usable = {count: usable_share(engine, count, tokens) for count in (1, 4, 16, CELL)}
    options = EngineOptions()
    return "\n".join(
        [
            summary,
            "One gateway on one core, simulated:\n",
            table(
                "core in use | whole answers/s | streams of 64 events/s | waits for the core, p99 "
                "| gateways for 1,000 answers/s | for 1,000 streams/s",
                [
                    (
                        f"{share:.0%}",
                        f"{share / whole_s:.0f}",
                        f"{share / stream_s:.0f}",
                        f"{1e3 * wait:.1f} ms",
                        math.ceil(1000 * whole_s / share),
                        math.ceil(1000 * stream_s / share),
                    )
                    for share, wait in waits.items()
                ],
            ),
            f"Engines of {engine.peak:.0f} tokens/s (batch {engine.batch}), answers of {tokens} tokens; the "
            f"most load at which\n99 % wait at most {WAIT_OF_ENGINE_S:g} s for a place, simulated:\n",
            table(
                "engines | share of their peak | tokens/s | answers/s",
                [
                    (
                        count,
                        f"{part:.0%}",
                        f"{part * count * engine.peak:,.0f}",
                        f"{part * count * engine.peak / tokens:.1f}",
                    )
                    for count, part in usable.items()
                ],
            ),
            f"An engine's tables ({options.rows} rows, {options.units_per_site} units at a site), counted:\n",
            table(
                "width of the model | a unit | a site | 64 sites",
                [
                    (
                        width,
                        f"{1024 * held / options.units_per_site:.1f} KB",
                        f"{held:.1f} MB",
                        f"{held / 16:.2f} GB",
                    )
                    for width in (576, 4096, 8192)
                    for held in [table_mb(width)]
                ],
            ),
            f"Streams of {tokens} tokens; gateways at {core:.0%} of a core, at most {CELL} engines a cell:\n",
            table(
                "streams/s | tokens/s | engines | gateways | cells | in flight in a cell "
                "| plans sent at a reload, all to all | … in a cell",
                [
                    _whole(rate, tokens, engine, usable[CELL], rate * stream_s / 64 * tokens / core)
                    for rate in (10, 100, 1_000, 10_000, 100_000)
                ],
            ),
        ]
    )


def _whole(rate: int, tokens: int, engine: Engine, usable: float, cores: float) -> tuple[object, ...]:
    engines = math.ceil(rate * tokens / (usable * engine.peak))
    cells = math.ceil(engines / CELL)
    # At least two, so that one may fail.
    gateways = max(2, math.ceil(cores / cells)) * cells
    in_flight = rate / cells * tokens * engine.step_s(engine.batch)
    sent = gateways * engines
    numbers = (rate, rate * tokens, engines, gateways, cells, round(in_flight), sent, sent // cells**2)
    return tuple(f"{number:,}" for number in numbers)


def main() -> None:
    """Print the tables, or write them to a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens-per-s", type=float, help="an engine's peak; default: measured on a CPU")
    parser.add_argument("--batch", type=int, default=16, help="the batch size at that peak")
    parser.add_argument("--output-tokens", type=int, default=200, help="mean length of an answer")
    parser.add_argument("--write", type=Path, help="the document to update between its marks")
    options = parser.parse_args()
    tables = report(options.output_tokens, options.tokens_per_s, options.batch)
    if options.write is None:
        print(tables)
        return
    before, _, rest = options.write.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    options.write.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    main()
