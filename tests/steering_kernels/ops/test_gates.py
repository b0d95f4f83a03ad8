"""Gates decide the same for the same tokens, however the scheduler splits, mixes and repeats them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering_kernels.ops import (
    GateView,
    SiteTable,
    StepMap,
    apply_edits,
    gate_open_reference,
    update_gates,
)
from steering_kernels.ops.gates import phase_mask

CPU = torch.device("cpu")


def make_gate(
    *, prompt_end: bool, latched: bool, phase: str, row: int = 1, max_norm: float = float("inf")
) -> GateView:
    """Fires where the first component of x exceeds 0.5."""
    return GateView(
        row=row,
        index=1,
        read=torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        bias=torch.zeros(1, dtype=torch.float64),
        cut=torch.full((1,), 0.5, dtype=torch.float64),
        require_all=False,
        prompt_end=prompt_end,
        latched=latched,
        phase=phase,
        max_norm=max_norm,
    )


@settings(deadline=None, max_examples=100)
@given(
    above=st.lists(st.booleans(), min_size=2, max_size=14),
    data=st.data(),
    prompt_end=st.booleans(),
    latched=st.booleans(),
    phase=st.sampled_from(["both", "prefill", "decode"]),
)
def test_refusal_is_noted_if_the_gate_is_open_where_the_answer_is_generated(
    above: list[bool], data: st.DataObject, prompt_end: bool, latched: bool, phase: str
) -> None:
    """In any chunks: noted from the first open token on that yields a token of the answer, never for an open
    gate inside the prompt, never for a gate without the flag, and forgotten with the request."""
    total = len(above)
    prompt_length = data.draw(st.integers(1, total), label="prompt length")
    gate = replace(make_gate(prompt_end=prompt_end, latched=latched, phase=phase), refusal=True)
    plain = replace(make_gate(prompt_end=prompt_end, latched=latched, phase=phase, row=2), index=2)
    opened = gate_open_reference(
        above, list(range(total)), prompt_length, prompt_end=prompt_end, latched=latched, phase=phase
    )
    step = StepMap(requests=3, gates=3, device=CPU)
    done = 0
    while done < total:
        end = data.draw(st.integers(done + 1, total), label="chunk end")
        x = torch.tensor([[float(value), 0.0] for value in above[done:end]])
        count = [end - done] * 2
        step.begin(
            rows=[1, 2],
            slots=[0, 1],
            num_tokens=count,
            first_position=[done, done],
            prompt_length=[prompt_length] * 2,
        )
        update_gates(torch.cat([x, x]), [gate, plain], step)
        done = end
        assert step.refused.tolist() == [int(any(opened[prompt_length - 1 : done])), 0, 0]
    step.forget_request(0)
    assert step.refused.tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=200)
@given(
    above=st.lists(st.booleans(), min_size=2, max_size=14),
    data=st.data(),
    prompt_end=st.booleans(),
    latched=st.booleans(),
    phase=st.sampled_from(["both", "prefill", "decode"]),
)
def test_gate_decision_is_independent_of_chunks_batch_and_recompute(
    above: list[bool], data: st.DataObject, prompt_end: bool, latched: bool, phase: str
) -> None:
    """In any chunks, beside other requests, preempted and recomputed: gates open at the same tokens."""
    total = len(above)
    prompt_length = data.draw(st.integers(1, total), label="prompt length")
    gate = make_gate(prompt_end=prompt_end, latched=latched, phase=phase)
    stranger = make_gate(prompt_end=False, latched=True, phase="both", row=2)
    expected = gate_open_reference(
        above, list(range(total)), prompt_length, prompt_end=prompt_end, latched=latched, phase=phase
    )
    x = torch.tensor([[float(value), 0.0] for value in above])
    step = StepMap(requests=4, gates=2, device=CPU)

    def run(first: int, last: int) -> list[bool]:
        neighbours = data.draw(st.integers(0, 3), label="neighbour tokens")
        step.begin(
            rows=[2, 1, 0] if neighbours else [1],
            slots=[3, 1, 0] if neighbours else [1],
            num_tokens=[neighbours, last - first, neighbours] if neighbours else [last - first],
            first_position=[0, first, 0] if neighbours else [first],
            prompt_length=[1, prompt_length, 1] if neighbours else [prompt_length],
        )
        noise = torch.ones(neighbours, 2)
        update_gates(torch.cat([noise, x[first:last], noise]), [gate, stranger], step)
        return step.gate_open[neighbours : neighbours + last - first, 1].tolist()

    seen: list[bool] = []
    while len(seen) < total:
        seen += run(len(seen), data.draw(st.integers(len(seen) + 1, total), label="chunk end"))
    assert seen == expected
    # Preempted and recomputed in one piece: the latch must not open earlier than before.
    assert run(0, total) == expected


def test_latches_of_two_requests_are_independent() -> None:
    """Two requests of one revision have separate latches, and a reused slot forgets its last owner."""
    gate = make_gate(prompt_end=False, latched=True, phase="both")
    step = StepMap(requests=2, gates=2, device=CPU)

    def run(values: list[float]) -> list[bool]:
        step.begin(rows=[1, 1], slots=[0, 1], num_tokens=[1, 1], first_position=[4, 4], prompt_length=[9, 9])
        update_gates(torch.tensor([[value, 0.0] for value in values]), [gate], step)
        return step.gate_open[:, 1].tolist()

    assert run([1.0, 0.0]) == [True, False]
    assert run([0.0, 0.0]) == [True, False]
    step.forget_request(0)
    assert run([0.0, 0.0]) == [False, False]


def test_gate_does_not_fire_at_an_attention_sink() -> None:
    """A token above the norm bound opens no gate."""
    gate = make_gate(prompt_end=False, latched=False, phase="both", max_norm=10.0)
    step = StepMap(requests=1, gates=2, device=CPU)
    step.begin(rows=[1], slots=[0], num_tokens=[2], first_position=[0], prompt_length=[2])
    update_gates(torch.tensor([[100.0, 0.0], [1.0, 0.0]]), [gate], step)
    assert step.gate_open[:, 1].tolist() == [False, True]
    assert step.opened.tolist() == [1]


def test_gate_that_cannot_read_the_prompt_end_opens() -> None:
    """A prompt whose last token is above the norm bound opens a prompt-end gate, unless it is the only
    token."""
    gate = make_gate(prompt_end=True, latched=True, phase="both", max_norm=10.0)
    step = StepMap(requests=2, gates=2, device=CPU)
    step.begin(rows=[1, 1], slots=[0, 1], num_tokens=[3, 1], first_position=[0, 0], prompt_length=[2, 1])
    update_gates(torch.tensor([[0.0, 0.0], [0.0, 99.0], [0.0, 0.0], [0.0, 99.0]]), [gate], step)
    assert step.gate_open[:, 1].tolist() == [False, True, True, False]


def test_first_generated_token_is_in_the_decode_phase() -> None:
    """The decode phase starts at the last prompt token, which yields the first generated token."""
    position = torch.arange(5)
    length = torch.full((5,), 3)
    decode, prefill = (phase_mask(phase, position, length) for phase in ("decode", "prefill"))
    assert decode is not None
    assert prefill is not None
    assert decode.tolist() == [False, False, True, True, True]
    assert prefill.tolist() == [True, True, True, False, False]


def test_pass_without_a_layout_raises() -> None:
    """Before a step is laid out, and after it has ended, no pass can run through an edit site."""
    table = SiteTable(2, rows=2, units=1, scales=0, device=CPU)
    step = StepMap(requests=1, gates=2, device=CPU)
    hidden = torch.ones(1, 2)
    undo: Callable[[], None]
    for undo in (lambda: None, step.end):
        undo()
        with pytest.raises(RuntimeError, match="before its batch was laid out"):
            apply_edits(hidden, table, step)
        step.clear()  # a dummy pass is announced as one
        apply_edits(hidden, table, step)
        step.begin(rows=[0], slots=[0], num_tokens=[1], first_position=[0], prompt_length=[1])
        apply_edits(hidden, table, step)


def test_pass_with_only_row_zero_costs_nothing() -> None:
    """A batch without policies needs no layout."""
    step = StepMap(requests=1, gates=2, device=CPU)
    step.begin(rows=[0, 0], slots=[0, 0], num_tokens=[5, 1], first_position=[0, 0], prompt_length=[5, 1])
    assert not step.active
    assert step.num_tokens == 0
