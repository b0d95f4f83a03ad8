"""Gates over the whole prompt decide the same, however its tokens reach the engine."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_kernels.ops import (
    GateView,
    ProbeHeads,
    PromptPart,
    StepMap,
    attention_probe_reference,
    empty_slots,
    max_unread_tokens,
    new_memory,
    update_gates,
    window_readings,
    windows_reference,
)

CPU = torch.device("cpu")
WIDTH, HEADS, PROMPT = 6, 2, 9


def heads(
    *,
    column: int = 0,
    max_norm: float = math.inf,
    seed: int = 0,
    before: int = 0,
    window: int | None = None,
) -> ProbeHeads:
    """``before``: number of heads at an earlier site, whose readings are in the columns before."""
    numbers = torch.Generator().manual_seed(seed)
    query, read = torch.randn(2, HEADS, WIDTH, generator=numbers, dtype=torch.float64)
    bias = torch.randn(HEADS, generator=numbers, dtype=torch.float64)
    summed = (*(((column - 2 * before, before),) if before else ()), (column, HEADS))
    return ProbeHeads(query, read, bias, max_norm, column, summed, window)


def gate(found: ProbeHeads, cut: float, *, row: int = 1, index: int = 1, latched: bool = True) -> GateView:
    return GateView(
        row=row,
        index=index,
        read=torch.zeros(0, 0, dtype=torch.float64),
        bias=torch.zeros(0, dtype=torch.float64),
        cut=torch.tensor([cut], dtype=torch.float64),
        require_all=False,
        prompt_end=True,
        latched=latched,
        phase="both",
        max_norm=math.inf,
        probe=found,
    )


def windowed(x: Tensor, found: ProbeHeads) -> list[float]:
    """The reading of every window; 0 for one of sinks alone."""
    numbers = (found.query, found.read, found.bias, found.max_norm)
    return [
        attention_probe_reference(x[span.start : span.stop], *numbers) or 0.0
        for span in windows_reference(len(x), found.window)
    ]


def reference(x: Tensor, found: ProbeHeads) -> float:
    return max(windowed(x, found))


def run(
    step: StepMap, gates: list[GateView], x: Tensor, first: int, slots: list[int], neighbours: int = 0
) -> list[bool]:
    """One pass over tokens first.. of a request in slot 1, row 1, between requests that pass through."""
    count = len(x) - neighbours * 2
    step.begin(
        rows=[0, 1, 0],
        slots=[0, 1, 2],
        num_tokens=[neighbours, count, neighbours],
        first_position=[0, first, 0],
        prompt_length=[max(neighbours, 1), PROMPT, max(neighbours, 1)],
    )
    end = min(first + count, PROMPT)
    if first < end:
        kept = torch.tensor(slots[:end])
        step.prompts.append(PromptPart(1, neighbours, kept, end - first, end == PROMPT))
    update_gates(x, gates, step)
    return step.gate_open[neighbours : neighbours + count, 1].tolist()


def new_step() -> StepMap:
    step = StepMap(requests=3, gates=3, device=CPU)
    step.memory = new_memory(64, CPU)
    return step


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    seed=st.integers(0, 10_000),
    bounded=st.booleans(),
    latched=st.booleans(),
    window=st.none() | st.integers(1, PROMPT + 1),
)
def test_probe_decision_equals_the_reference_under_chunks_cache_and_recompute(
    data: st.DataObject, seed: int, bounded: bool, latched: bool, window: int | None
) -> None:
    """In any windows, chunks and slots, beside others, partly cached: the decision is that on one pass."""
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(PROMPT + 3, WIDTH, generator=numbers)
    # A bound that skips as many tokens as allowed, or one more, in which case the gate opens.
    ignored = data.draw(st.integers(1, max_unread_tokens(PROMPT) + 1), label="ignored")
    norms = x[:PROMPT].norm(dim=1).sort().values
    max_norm = float(norms[-ignored - 1] + norms[-ignored]) / 2 if bounded else math.inf
    found = heads(max_norm=max_norm, seed=seed, window=window)
    reading = reference(x[:PROMPT], found)
    above = data.draw(st.booleans(), label="above the cut")
    opens = above or (bounded and ignored > max_unread_tokens(PROMPT))
    view = gate(found, reading - (1e-4 if above else -1e-4), latched=latched)
    expected = [opens and place == PROMPT - 1 for place in range(PROMPT + 3)]
    if latched:
        expected = [opens and place >= PROMPT - 1 for place in range(PROMPT + 3)]
    slots = np.random.default_rng(seed).permutation(64)[:PROMPT].tolist()
    step = new_step()

    def pass_over(first: int, last: int) -> list[bool]:
        noise = torch.ones(data.draw(st.integers(0, 2), label="neighbour tokens"), WIDTH)
        return run(step, [view], torch.cat([noise, x[first:last], noise]), first, slots, len(noise))

    seen: list[bool] = []
    while len(seen) < len(x):
        seen += pass_over(len(seen), data.draw(st.integers(len(seen) + 1, len(x)), label="chunk end"))
    assert seen == expected
    # Another request of the revision finds all but the last prompt tokens cached, in the same slots.
    step.forget_request(1)
    cached = data.draw(st.integers(1, PROMPT - 1), label="cached tokens")
    assert pass_over(cached, len(x)) == expected[cached:]
    # Preempted, its slots reused, then recomputed in others.
    slots = slots[::-1]
    assert pass_over(0, len(x)) == expected


def test_probe_fires_if_a_reading_is_missing() -> None:
    """An unwritten slot makes the reading NaN: the gate opens, whatever the cut."""
    x = torch.randn(PROMPT, WIDTH, generator=torch.Generator().manual_seed(1))
    view = gate(heads(), 1e6)
    step = new_step()
    assert run(step, [view], x, 0, list(range(PROMPT))) == [False] * PROMPT
    step.forget_request(1)
    assert run(step, [view], x[4:], 4, list(range(20, 20 + PROMPT)))[-1] is True


def test_emptied_slots_hold_no_earlier_readings() -> None:
    """In emptied blocks another prompt finds no readings, so its gate opens."""
    x = torch.randn(PROMPT, WIDTH, generator=torch.Generator().manual_seed(1))
    view = gate(heads(), 1e6)
    step = new_step()
    assert run(step, [view], x, 0, list(range(PROMPT)))[-1] is False
    step.forget_request(1)
    assert (
        run(step, [view], x[8:], 8, list(range(PROMPT)))[-1] is False
    )  # its own readings, as from the cache
    step.forget_request(1)
    assert step.memory is not None
    empty_slots(step.memory, torch.tensor([1]), 4)
    assert step.memory.isnan().all(dim=1).nonzero().flatten().tolist()[:4] == [4, 5, 6, 7]
    assert run(step, [view], x[8:], 8, list(range(PROMPT)))[-1] is True


@pytest.mark.parametrize("sinks", [1, max_unread_tokens(PROMPT), max_unread_tokens(PROMPT) + 1, PROMPT])
def test_gate_that_skipped_too_many_tokens_opens(sinks: int) -> None:
    """A few tokens above the norm bound are normal; a prompt of only such tokens cannot be judged."""
    step = new_step()
    view = gate(heads(max_norm=5.0), 1e6)
    x = torch.full((PROMPT, WIDTH), 0.1)
    x[:sinks] = 9.0
    opened = run(step, [view], x, 0, list(range(PROMPT)))
    assert opened[:-1] == [False] * (PROMPT - 1)
    assert opened[-1] is (sinks > max_unread_tokens(PROMPT))


def test_prompt_of_one_sink_opens_no_gate() -> None:
    """The first token is always a sink: a prompt of only that token opens no gate."""
    step = new_step()
    view = gate(heads(max_norm=1.0), 1e6)
    step.begin(rows=[1], slots=[1], num_tokens=[1], first_position=[0], prompt_length=[1])
    step.prompts.append(PromptPart(1, 0, torch.tensor([0]), 1, True))
    update_gates(torch.full((1, WIDTH), 9.0), [view], step)
    assert step.gate_open[0, 1].item() is False


def test_two_probes_of_a_row_are_independent() -> None:
    """Each probe of a row has its own columns, and decides as it would alone."""
    x = torch.randn(PROMPT, WIDTH, generator=torch.Generator().manual_seed(2))
    first, second = heads(seed=0), heads(seed=1, column=2 * HEADS)
    step = new_step()
    views = [
        gate(first, reference(x, first) - 1e-3, index=1),
        gate(replace(second, summed=second.summed[-1:]), reference(x, second) + 1e-3, index=2),
    ]
    run(step, views, x, 0, list(range(PROMPT)))
    assert step.gate_open[-1, 1:].tolist() == [True, False]


@pytest.mark.parametrize("opens", [True, False])
def test_probe_sums_readings_of_earlier_sites(opens: bool) -> None:
    """Heads of two sites decide by their sum at the second site, in two chunks as in one."""
    numbers = torch.Generator().manual_seed(3)
    early, late = (torch.randn(PROMPT, WIDTH, generator=numbers) for _ in range(2))
    first = replace(heads(seed=4), summed=())
    second = heads(seed=5, column=2 * HEADS, before=HEADS)
    cut = reference(early, first) + reference(late, second) + (-1e-3 if opens else 1e-3)
    for chunks in ([(0, PROMPT)], [(0, 4), (4, PROMPT)]):
        step = new_step()
        for begin, end in chunks:
            run(step, [gate(first, cut)], early[begin:end], begin, list(range(PROMPT)))
            update_gates(late[begin:end], [gate(second, cut)], step)  # the same pass, at the second site
        assert step.gate_open[-1, 1].item() is opens


@settings(deadline=None, max_examples=100)
@given(tokens=st.integers(1, 40), window=st.integers(1, 45), seed=st.integers(0, 10_000))
def test_windows_are_read_as_the_reference_reads_them(tokens: int, window: int, seed: int) -> None:
    """For any length and window, each window's reading is the reference's on those tokens alone; windows
    cover the prompt, and a short prompt is one window."""
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=numbers, dtype=torch.float64)
    found = heads(max_norm=float(x.norm(dim=1).median()), seed=seed, window=window)
    score = (x @ found.query.t()).masked_fill((x.norm(dim=1) > found.max_norm)[:, None], -math.inf)
    readings = window_readings(score, x @ found.read.t() + found.bias, window)
    torch.testing.assert_close(readings, torch.tensor(windowed(x, found), dtype=torch.float64))
    spans = windows_reference(tokens, window)
    assert {place for span in spans for place in span} == set(range(tokens))
    assert {len(span) for span in spans} == {min(tokens, window)}
    assert (len(spans) == 1) == (tokens <= window)
    gaps = {after.start - before.start for before, after in pairwise(spans)}
    assert all(0 < gap <= max(1, window // 4) for gap in gaps)


def test_no_window_is_the_whole_prompt_to_the_last_bit() -> None:
    """Without a window, or with one that the prompt fits in, the reading is the one of the whole prompt."""
    numbers = torch.Generator().manual_seed(6)
    score, value = torch.randn(2, 50, HEADS, generator=numbers, dtype=torch.float64)
    whole = (score.softmax(dim=0) * value).sum()[None]
    assert torch.equal(window_readings(score, value, None), whole)
    assert torch.equal(window_readings(score, value, 50), whole)
    assert len(window_readings(score, value, 49)) == 2


@pytest.mark.parametrize("opens", [True, False])
def test_windows_of_two_sites_are_summed_window_by_window(opens: bool) -> None:
    """The sites' readings of the same window add up; the largest sum decides, not the sum of the largest."""
    numbers = torch.Generator().manual_seed(3)
    early, late = (torch.randn(PROMPT, WIDTH, generator=numbers) for _ in range(2))
    first = replace(heads(seed=4, window=3), summed=())
    second = heads(seed=5, column=2 * HEADS, before=HEADS, window=3)
    pairs = list(zip(windowed(early, first), windowed(late, second), strict=True))
    largest = max(a + b for a, b in pairs)
    assert largest < max(a for a, _ in pairs) + max(b for _, b in pairs) - 1e-2
    cut = largest + (-1e-3 if opens else 1e-3)
    step = new_step()
    run(step, [gate(first, cut)], early, 0, list(range(PROMPT)))
    update_gates(late, [gate(second, cut)], step)
    assert step.gate_open[-1, 1].item() is opens


def test_missing_reading_in_any_window_opens_the_gate() -> None:
    """One unwritten slot is enough, also in a window whose reading is not the largest."""
    x = torch.randn(PROMPT, WIDTH, generator=torch.Generator().manual_seed(1))
    view = gate(heads(window=2), 1e6)
    for missing in range(PROMPT - 1):
        step = new_step()
        assert run(step, [view], x, 0, list(range(PROMPT)))[-1] is False
        step.forget_request(1)
        assert step.memory is not None
        step.memory[missing] = math.nan
        assert run(step, [view], x[-1:], PROMPT - 1, list(range(PROMPT)))[-1] is True


def test_pass_without_memory_does_not_run() -> None:
    """A gate over whole prompts never runs without its memory."""
    step = StepMap(requests=3, gates=3, device=CPU)
    with pytest.raises(RuntimeError, match="no prompt memory"):
        run(step, [gate(heads(), 0.0)], torch.ones(PROMPT, WIDTH), 0, list(range(PROMPT)))
