"""What steering costs: an engine without the plugin, with it idle, and with all requests steered.

    python -m benchmarks.steering [--rounds 10] [--json]

All requests of the steered run are edited by five JumpReLU features at each of two layers, behind a gate at
the prompt's end. Every round runs the three settings in a new order, so that drift of the machine falls on
all of them alike; a ratio is taken within its round, and the median over rounds is reported
with its quartiles. The output is checked in every round: idle must give the vanilla tokens, steered must
have applied edits.

What it does not show: the gateway's own cost, prompts longer than 16 tokens, batches above 16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.engine_worker import encode_plan
from interpretops.default_model import ensure_default_model
from interpretops.model_spec import read_model_spec
from interpretops.plan import ALWAYS, Gate, ModelSpec, Plan, Site, SiteEdits, Units
from interpretops.settings import load_settings

SETTINGS = ("vanilla", "idle", "steered")
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 64
FEATURES, LAYERS = 5, (10, 18)
WORKER = Path(__file__).with_name("engine_worker.py")
RESULTS = Path(__file__).with_name("results")


def steered_plan(spec: ModelSpec) -> Plan:
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
                threshold=column(0.1),
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
        np.full(1, -1e6, np.float32),
        scope="prompt_end",
        latched=True,
    )
    return Plan("benchmark", "benchmark", spec, edits, (ALWAYS, gate))


class Engine:
    """A worker process with one engine."""

    def __init__(self, model: Path, plans: list[Plan], *, plugin: bool) -> None:
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
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "enable_prefix_caching": False,
        }
        self._send({"engine": engine, "plans": [encode_plan(plan.to_bytes()) for plan in plans]})
        self._receive()

    def run(self, prompts: list[list[int]], revision: str) -> dict[str, Any]:
        """One batch; seconds, tokens and edits."""
        self._send({"prompts": prompts, "revisions": [revision] * len(prompts), "max_tokens": OUTPUT_TOKENS})
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


def measure(rounds: int) -> dict[str, Any]:
    """Run everything; the result as it is written to disk."""
    model = ensure_default_model(load_settings().cache.dir)
    plan = steered_plan(read_model_spec(model))
    vanilla = Engine(model, [], plugin=False)
    ours = Engine(model, [plan], plugin=True)
    rng = random.Random(0)
    result: dict[str, Any] = {}
    try:
        for batch in (1, 16):
            prompts = [
                [1, *(rng.randrange(100, 40_000) for _ in range(PROMPT_TOKENS - 1))] for _ in range(batch)
            ]
            runs = {
                "vanilla": lambda p=prompts: vanilla.run(p, "none"),
                "idle": lambda p=prompts: ours.run(p, "none"),
                "steered": lambda p=prompts: ours.run(p, plan.revision),
            }
            for run in runs.values():
                run()  # warm up
            seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
            for _ in track(range(rounds), f"batch {batch}"):
                answers = {name: runs[name]() for name in rng.sample(SETTINGS, len(SETTINGS))}
                check(answers)
                for name, answer in answers.items():
                    seconds[name].append(answer["seconds"])
            result[f"batch_{batch}"] = summarise(seconds, batch)
    finally:
        vanilla.close()
        ours.close()
    return result


def check(answers: dict[str, dict[str, Any]]) -> None:
    """The figures count only if the outputs are right."""
    if answers["idle"]["tokens"] != answers["vanilla"]["tokens"]:
        raise RuntimeError("the idle plugin changed an answer")
    if answers["idle"]["edits"] or not answers["steered"]["edits"]:
        raise RuntimeError(f"edits: idle {answers['idle']['edits']}, steered {answers['steered']['edits']}")


def summarise(seconds: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Throughput of each setting, and its ratio to vanilla within each round."""
    tokens = batch * OUTPUT_TOKENS
    summary: dict[str, Any] = {}
    for name in SETTINGS:
        ratios = [base / own for base, own in zip(seconds["vanilla"], seconds[name], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        summary[name] = {
            "tokens_per_s": round(tokens / statistics.median(seconds[name]), 1),
            "over_vanilla": round(statistics.median(ratios), 4),
            "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        }
    return summary


def machine() -> str:
    """Processor and cores, as the system names them."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit measured, marked when the tree was not clean."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True
    )
    return described.stdout.strip()


def main() -> None:
    """Measure, show a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds per batch size")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line at the end")
    options = parser.parse_args()
    result = {
        "rounds": options.rounds,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "commit": commit(),
        "model": "smollm2-135m-instruct, bfloat16, eager",
        **measure(options.rounds),
    }
    console = Console()
    for batch in ("batch_1", "batch_16"):
        for name in SETTINGS:
            row = result[batch][name]
            console.print(
                f"{batch:9} {name:8} {row['tokens_per_s']:8} tok/s  x{row['over_vanilla']:.4f} "
                f"of vanilla (quartiles {row['quartiles'][0]:.4f} to {row['quartiles'][1]:.4f})"
            )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "steering.json").write_text(json.dumps(result, indent=2) + "\n")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
