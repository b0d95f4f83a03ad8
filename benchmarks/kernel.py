"""How close the edit op is to its lower bound: bytes moved over bandwidth, or one kernel launch if longer.

    python -m benchmarks.kernel [--repeats 50] [--json]

Width 4,096, bfloat16 with a residual, 256 resident rows of 8 units, every token steered. A decode step of T
tokens draws T of the rows; a prefill of 8,192 tokens is of one. Beside the op: the grouped path in plain
torch, and an edit that only adds each row's vector. Bandwidth and the time of a kernel that does nothing are
measured in the same run; the op's result is held against the grouped path's.

On a GPU what can be captured is timed in a CUDA graph, as an engine replays it, with the second-level cache
emptied before every call, since in an engine the layers' weights empty it; `launched_us` is a call from
Python, which is what a step outside of graphs pays. Without a GPU there is only the grouped path, and the
result says so.

What it does not show: anything around the op in an engine (see `benchmarks.steering`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import commit, machine, write
from steering_kernels.ops import RowEdits, SiteTable, StepMap, apply_edits, apply_edits_captured

WIDTH, ROWS, UNITS = 4096, 256, 8
DECODE, PREFILL = (1, 4, 16, 64, 256), 8192


def make_table(device: torch.device) -> SiteTable:
    """A table with all rows resident: JumpReLU features that are scaled."""
    table = SiteTable(WIDTH, rows=ROWS + 1, units=ROWS * UNITS, scales=0, device=device)
    column = torch.zeros(UNITS)
    for row in range(1, ROWS + 1):
        table.set_row(
            row,
            RowEdits(
                read=torch.randn(UNITS, WIDTH) / WIDTH**0.5,
                write=torch.randn(UNITS, WIDTH) / WIDTH**0.5,
                bias=column,
                threshold=column + 0.1,
                gain=column - 0.65,
                offset=column,
                low=column - torch.inf,
                high=column + torch.inf,
                max_norm=column + torch.inf,
                gate=column.int(),
                topk=column.int() - 1,
                scale=torch.zeros(0, WIDTH),
                scale_gate=torch.zeros(0, dtype=torch.int32),
            ),
        )
    return table


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after a warm-up."""
    for _ in range(3):
        call()
    spans = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            spans.append(begin.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            call()
            spans.append(time.perf_counter() - started)
    return statistics.median(spans)


def seconds_in_graph(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call in a replayed graph, with a cold cache."""
    junk = torch.zeros(2**26, device=device)
    times = 10

    def captured(calls: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                junk.zero_()
                if calls:
                    call()
        return graph

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with_calls, without = captured(True), captured(False)
    spans = [seconds_of(graph.replay, device, repeats) for graph in (with_calls, without)]
    return max(spans[0] - spans[1], 0.0) / times


def measure(repeats: int) -> dict[str, Any]:
    """Ratio of time to the lower bound for every available implementation, by number of tokens."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = make_table(device)
    block, copy = torch.zeros(2, 2**26, dtype=torch.bfloat16, device=device)
    bandwidth = 2 * block.nbytes / seconds_of(lambda: copy.copy_(block), device, 5)
    one = torch.zeros(1, device=device)
    timed = seconds_in_graph if device.type == "cuda" else seconds_of
    launch = timed(lambda: one.add_(1), device, repeats)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu: no GPU, grouped path only",
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "empty_kernel_us": round(launch * 1e6, 2),
    }
    for tokens in (*DECODE, PREFILL):
        rows = [7] * tokens if tokens == PREFILL else (torch.randperm(ROWS)[:tokens] + 1).tolist()
        result[f"tokens_{tokens}"] = measure_at(rows, table, bandwidth, launch, repeats)
    return result


def measure_at(
    rows: list[int], table: SiteTable, bandwidth: float, launch: float, repeats: int
) -> dict[str, Any]:
    """Measure one batch with one row per token."""
    device, tokens = table.read.device, len(rows)
    step = StepMap(requests=tokens, gates=1, device=device, graph_tokens=tokens)
    ones = [1] * tokens
    step.begin(rows=rows, slots=list(range(tokens)), num_tokens=ones, first_position=ones, prompt_length=ones)
    hidden, residual = torch.randn(2, tokens, WIDTH, device=device).bfloat16()
    floor = max(launch, (3 * hidden.nbytes + len(set(rows)) * UNITS * WIDTH * 4 * 2) / bandwidth)

    def edited(backend: Any) -> Tensor:
        out = hidden.clone()
        apply_edits(out, table, step, residual, backend=backend)
        return out

    def grouped() -> None:
        apply_edits(hidden, table, step, residual, backend="grouped")

    def additive() -> None:
        hidden.add_(table.write[step.row_of_token])

    def fused() -> None:
        if tokens == PREFILL:
            apply_edits(hidden, table, step, residual, backend="triton")
        else:
            apply_edits_captured(hidden, table, step, residual, None)

    found: dict[str, Any] = {"floor_us": round(floor * 1e6, 2)}
    calls: dict[str, Callable[[], None]] = {"grouped": grouped, "additive": additive}
    if device.type == "cuda":
        assert torch.allclose(edited("triton").float(), edited("grouped").float(), rtol=0.02, atol=1e-3)
        calls["fused"] = fused
    for name, call in calls.items():
        launched = seconds_of(call, device, repeats)
        replays = device.type == "cuda" and name != "grouped"
        seconds = seconds_in_graph(call, device, repeats) if replays else launched
        found[name] = {"us": round(seconds * 1e6, 1), "over_floor": round(seconds / floor, 2)}
        if replays:
            found[name]["launched_us"] = round(launched * 1e6, 1)
    return found


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50, help="timed calls per figure")
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    options = parser.parse_args()
    result = {"machine": machine(), "commit": commit(), **measure(options.repeats)}
    for name, row in result.items():
        print(f"{name:20} {row}")
    write("kernel", result)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
