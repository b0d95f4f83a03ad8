"""The cost of steering compared with an engine without the plugin: idle, gated, and with 1 to 64 revisions.

    python -m benchmarks.steering [--rounds 10] [--minutes 12] [--price-per-hour 1.20] [--json]
    python -m benchmarks.steering --graphs --batch 1 --batch 64 --name steering-h200  # on a GPU

A steered request is edited by five JumpReLU features at each of two layers, behind a gate at the prompt's
end; under K revisions a batch draws its own at random from K resident ones; `gated` has the same edits behind
a gate that stays closed. Every round runs all settings in a new order, so that drift of the machine falls on
all of them alike; a ratio is taken within its round, and the median over rounds is reported with its
quartiles. The output is checked in every round: idle and gated must give the vanilla tokens, the revisions,
which hold the same numbers under different names, must all give the same tokens, with edits.

`itl_ms` is the mean over a request's steps, the one for its short prompt included. `--graphs` compiles the
model and captures CUDA graphs, as vLLM does by itself; a folder with a config.json and no weights to speak of
is measured with `--load-format dummy`, since numbers cost the same whatever they are.

What it does not show: the gateway's own cost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.engine_worker import encode_plan
from benchmarks.record import commit, machine, write
from interpretops.model.default_model import ensure_default_model
from interpretops.model.spec import read_model_spec
from interpretops.plan import ALWAYS, Gate, ModelSpec, Plan, Site, SiteEdits, Units
from interpretops.settings import load_settings

REVISIONS = {"steered": 1, "k4": 4, "k16": 16, "k64": 64}
"""Numbers of revisions that a setting draws from."""
SETTINGS = ("vanilla", "idle", "gated", *REVISIONS)
TTFT_SETTINGS = ("vanilla", "idle", "gated", "steered")
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 64
BATCHES = [1, 4, 16]
TTFT_PROMPTS = (16, 512)
FEATURES, LAYERS = 5, (10, 18)
REST_S = 1.2
"""Pause before each batch: after its last one a worker spins for a second, and both are bound to one core."""
WORKER = Path(__file__).with_name("engine_worker.py")


def steered_plan(spec: ModelSpec, name: str = "benchmark", *, opens: bool = True) -> Plan:
    """Five JumpReLU features at two layers with random unit directions, active at about half the tokens."""
    rng = np.random.default_rng(0)

    def directions(count: int) -> np.ndarray:
        rows = rng.normal(size=(count, spec.hidden_size)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def column(value: float) -> np.ndarray:
        return np.full(FEATURES, value, np.float32)

    edits = {
        Site(layer, "resid_post"): SiteEdits(
            Units(
                read=directions(FEATURES),
                write=directions(FEATURES),
                bias=column(0.0),
                threshold=column(0.0),
                gain=column(-0.65),
                offset=column(0.0),
                low=column(-np.inf),
                high=column(np.inf),
                max_norm=column(2000.0),
                gate=np.full(FEATURES, 1, np.int32),
                topk=np.full(FEATURES, -1, np.int32),
            )
        )
        for layer in LAYERS
    }
    gate = Gate(
        Site(LAYERS[0], "resid_post"),
        directions(1),
        np.zeros(1, np.float32),
        np.full(1, -1e6 if opens else 1e6, np.float32),
        scope="prompt_end",
        latched=True,
    )
    return Plan(name, "benchmark", spec, edits, (ALWAYS, gate))


class Engine:
    """A worker process with one engine."""

    def __init__(self, model: Path, plans: list[Plan], setup: dict[str, Any], *, plugin: bool) -> None:
        reader, writer = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writer],
            text=True,
            env=os.environ
            | {
                "VLLM_PLUGINS": "interpretops" if plugin else "none",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
            },
        )
        os.close(writer)
        self._answers = os.fdopen(reader)
        engine = {
            "model": str(model),
            "max_model_len": 1024,
            "enable_prefix_caching": False,
            **setup,
        }
        if plugin:
            engine["additional_config"] = {"interpretops": {"rows": len(plans) + 4}}
        self._send({"engine": engine, "plans": [encode_plan(plan.to_bytes()) for plan in plans]})
        self._receive()

    def run(self, prompts: list[list[int]], revisions: list[str], max_tokens: int) -> dict[str, Any]:
        """Run one batch; returns seconds, tokens and edits."""
        self._send({"prompts": prompts, "revisions": revisions, "max_tokens": max_tokens})
        answer: dict[str, Any] = self._receive()
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("an engine died; run benchmarks/engine_worker.py by hand to see why")
        return json.loads(line)


def measure(
    rounds: int, minutes: float, model: Path, setup: dict[str, Any], batches: list[int]
) -> dict[str, Any]:
    """Run everything; returns the result as written to disk. Starts no round that would end too late.

    ``setup``: options that the engines are started with.
    """
    started = time.monotonic()
    spec = read_model_spec(model)
    plans = [steered_plan(spec, f"benchmark-{index}") for index in range(max(REVISIONS.values()))]
    closed = steered_plan(spec, "benchmark-closed", opens=False)
    rng = random.Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        most = min(40_000, spec.vocab_size)
        return [[1, *(rng.randrange(100, most) for _ in range(length - 1))] for _ in range(count)]

    # name of a measurement: its prompts, requested tokens, and compared settings
    work: dict[str, tuple[list[list[int]], int, tuple[str, ...]]] = {
        f"batch_{batch}": (prompts(batch, PROMPT_TOKENS), OUTPUT_TOKENS, SETTINGS) for batch in batches
    }
    work |= {f"ttft_{length}": (prompts(1, length), 1, TTFT_SETTINGS) for length in TTFT_PROMPTS}
    vanilla, ours = Engine(model, [], setup, plugin=False), None
    try:
        ours = Engine(model, [*plans, closed], setup, plugin=True)

        def once(setting: str, texts: list[list[int]], tokens: int) -> dict[str, Any]:
            if setting in REVISIONS:
                resident = plans[: REVISIONS[setting]]
                drawn = rng.sample(resident, min(len(texts), len(resident)))
                revisions = [drawn[index % len(drawn)].revision for index in range(len(texts))]
            else:
                revisions = [closed.revision if setting == "gated" else "none"] * len(texts)
            time.sleep(REST_S)
            return (vanilla if setting == "vanilla" else ours).run(texts, revisions, tokens)

        def play(name: str) -> dict[str, float]:
            texts, tokens, settings = work[name]
            answers = {item: once(item, texts, tokens) for item in rng.sample(settings, len(settings))}
            check(answers)
            return {item: answer["seconds"] for item, answer in answers.items()}

        for name in work:
            play(name)  # warm up
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in work}
        longest = 0.0
        for done in track(range(rounds), "rounds"):
            begun = time.monotonic()
            if done > 1 and begun - started + longest > 60 * minutes:
                break
            for name in work:
                seconds[name].append(play(name))
            longest = max(longest, time.monotonic() - begun)
    finally:
        vanilla.close()
        if ours is not None:
            ours.close()
    result: dict[str, Any] = {"rounds": len(next(iter(seconds.values())))}
    for name, (texts, tokens, settings) in work.items():
        result[name] = summarise(seconds[name], settings, len(texts) * tokens)
    for batch in batches:
        for row in result[f"batch_{batch}"].values():
            row["itl_ms"] = round(1000 * row["seconds"] / OUTPUT_TOKENS, 3)
    return result


def check(answers: dict[str, dict[str, Any]]) -> None:
    """Check the outputs; figures are only valid if these are right."""
    for setting, answer in answers.items():
        like = "steered" if setting in REVISIONS else "vanilla"
        if answer["tokens"] != answers[like]["tokens"]:
            raise RuntimeError(f"the answers under {setting!r} are not those under {like!r}")
        if bool(answer["edits"]) != (setting in REVISIONS):
            raise RuntimeError(f"{answer['edits']} edits were applied under {setting!r}")


def summarise(rounds: list[dict[str, float]], settings: tuple[str, ...], tokens: int) -> dict[str, Any]:
    """Throughput of each setting, and its ratio to vanilla within each round."""
    summary: dict[str, Any] = {}
    for name in settings:
        ratios = [one["vanilla"] / one[name] for one in rounds]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        seconds = statistics.median(one[name] for one in rounds)
        summary[name] = {
            "tokens_per_s": round(tokens / seconds, 1),
            "seconds": round(seconds, 5),
            "over_vanilla": round(statistics.median(ratios), 4),
            "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        }
    return summary


def headline(result: dict[str, Any], full_batch: int, price_per_hour: float | None) -> dict[str, Any]:
    """The headline figures: a full batch's throughput and the long prompt's TTFT, relative to vanilla."""
    full, long = result[f"batch_{full_batch}"], result[f"ttft_{max(TTFT_PROMPTS)}"]["steered"]
    low, high = long["quartiles"]
    found: dict[str, Any] = {name: full[name]["over_vanilla"] for name in ("idle", "steered", "k64")}
    found["ttft"] = round(1 / long["over_vanilla"], 4)
    found["spreads"] = {name: full[name]["quartiles"] for name in ("idle", "steered", "k64")}
    found["spreads"]["ttft"] = [round(1 / high, 4), round(1 / low, 4)]
    if price_per_hour is not None:
        per_request = {name: row["seconds"] / full_batch for name, row in full.items()}
        found["cost_per_1000_requests"] = {
            name: round(1000 * seconds * price_per_hour / 3600, 5) for name, seconds in per_request.items()
        }
    return found


def main() -> None:
    """Measure, show a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds at most")
    parser.add_argument("--minutes", type=float, default=12, help="start no round that would end later")
    parser.add_argument(
        "--price-per-hour", type=float, help="price of this machine; adds cost per 1,000 requests"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line at the end")
    parser.add_argument("--model", type=Path, help="folder of the model; default: the default model")
    parser.add_argument("--load-format", default="auto", help="as in vLLM; `dummy` needs no weights")
    parser.add_argument("--dtype", default="bfloat16", help="float32 for processors without bfloat16")
    parser.add_argument("--graphs", action="store_true", help="compile the model and capture CUDA graphs")
    parser.add_argument("--batch", type=int, action="append", help="requests in a batch (repeated)")
    parser.add_argument("--memory", type=float, default=0.4, help="each engine's share of a GPU's memory")
    parser.add_argument("--name", default="steering", help="name of the results file")
    options = parser.parse_args()
    model = options.model or ensure_default_model(load_settings().cache.dir)
    batches = options.batch or BATCHES
    setup = {
        "enforce_eager": not options.graphs,
        "load_format": options.load_format,
        "dtype": options.dtype,
        "max_num_seqs": max(batches),
        "gpu_memory_utilization": options.memory,
        "skip_tokenizer_init": options.load_format == "dummy",
    }
    if options.graphs:
        setup["cudagraph_capture_sizes"] = sorted({1, 2, 4, 8, 16, *batches})
    measured = measure(options.rounds, options.minutes, model, setup, batches)
    result = {
        **headline(measured, max(batches), options.price_per_hour),
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "commit": commit(),
        "model": f"{model.name}, {options.dtype}, {'graphs' if options.graphs else 'eager'}",
        **measured,
    }
    console = Console()
    for name, settings in measured.items():
        for setting, row in settings.items() if isinstance(settings, dict) else ():
            console.print(
                f"{name:9} {setting:8} {row['tokens_per_s']:8} tok/s  x{row['over_vanilla']:.4f} "
                f"of vanilla (quartiles {row['quartiles'][0]:.4f} to {row['quartiles'][1]:.4f})"
            )
    write(options.name, result)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
