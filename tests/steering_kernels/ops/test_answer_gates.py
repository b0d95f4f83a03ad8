"""Gates over the answer decide the same, however its tokens reach the engine."""

import math
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interpretops.plan import ALWAYS, Gate, ModelSpec, Plan, ProbePart, Site
from interpretops.plan.compose import compose_plans
from interpretops.steering.plan_bank import PlanBank
from steering_kernels.ops import attention_probe_reference, update_gates

SPEC = ModelSpec("tiny", "ab" * 32, "LlamaForCausalLM", 6, 4, 1, 1, 6, 10)
SITES = [Site(1, "resid_post"), Site(2, "resid_post")]
PROMPT, ANSWER, BATCH = 7, 9, 3
TOTAL = PROMPT + ANSWER


def probe(seed: int, sites: list[Site], max_norm: float = math.inf) -> tuple[ProbePart, ...]:
    rng = np.random.default_rng(seed)
    found = []
    for site in sites:
        query, read = rng.normal(size=(2, 2, 6)).astype(np.float32)
        found.append(ProbePart(site, query, read, rng.normal(size=2).astype(np.float32), max_norm))
    return tuple(found)


def probe_gate(seed: int, cut: float, sites: list[Site], **options: object) -> Gate:
    bound = options.pop("max_norm", math.inf)
    return Gate(
        sites[-1],
        ALWAYS.read,
        ALWAYS.bias,
        np.array([cut], np.float32),
        latched=True,
        probe=probe(seed, sites, bound),  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    )


def reading(gate: Gate, x: dict[Site, Tensor], begin: int, end: int) -> float:
    """By the reference, over tokens begin..end - 1."""
    total = 0.0
    for part in gate.probe:
        query, read, bias = (torch.from_numpy(array) for array in (part.query, part.read, part.bias))
        total += attention_probe_reference(x[part.site][begin:end], query, read, bias, part.max_norm) or 0.0
    return total


def answer_readings(plan: Plan, x: dict[Site, Tensor]) -> list[float]:
    """What the answer's gate (gates[2]) reads at each generated token."""
    prompt, gate = plan.gates[1:]
    assert gate.window is not None
    return [
        reading(gate, x, max(PROMPT, place + 1 - gate.window), place + 1)
        + gate.prompt_weight * reading(prompt, x, 0, PROMPT)
        for place in range(PROMPT, TOTAL)
    ]


def run(bank: PlanBank, plan: Plan, x: dict[Site, Tensor], first: int, last: int, blocks: Tensor) -> Tensor:
    """One pass over positions first..last - 1, between requests that pass through; gate 2 at each of them."""
    noise = 2
    bank.begin_step(
        revisions=[None, plan.revision, None],
        slots=[0, 1, 2],
        num_tokens=[noise, last - first, noise],
        first_position=[0, first, 0],
        prompt_length=[1, PROMPT, noise],
        memory_slots=lambda _place, position: blocks[torch.from_numpy(position)],
    )
    for site in SITES:
        own = x[site][first:last]
        spread = torch.cat([own.new_ones(noise, 6), own, own.new_ones(noise, 6)])
        update_gates(spread, bank.gates_at.get(site, []), bank.step)
    return bank.step.gate_open[noise:-noise, 2].clone()


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    seed=st.integers(0, 10_000),
    window=st.integers(1, ANSWER + 2),
    weight=st.sampled_from([0.0, 1.5, -0.5]),
    opens_at=st.integers(0, ANSWER),
)
def test_verdict_equals_the_reference_under_chunks_cache_and_recompute(
    data: st.DataObject, seed: int, window: int, weight: float, opens_at: int
) -> None:
    """From the first generated token whose window reads above the cut, and never on the prompt: in any chunks
    and slots, with the prompt partly cached, and after a preemption."""
    numbers = torch.Generator().manual_seed(seed)
    x = {site: torch.randn(TOTAL, 6, generator=numbers) for site in SITES}
    beside = {"beside": 1, "prompt_weight": weight} if weight else {}
    answer = probe_gate(seed, 0.0, SITES, scope="answer", window=window, **beside)
    plan = Plan("p", "t", SPEC, {}, (ALWAYS, probe_gate(seed + 1, 1e6, SITES[:1], scope="prompt"), answer))
    readings = answer_readings(plan, x)
    # Opens where a reading first exceeds all before it; or nowhere.
    cut = max(readings) + 1e-3 if opens_at == ANSWER else readings[opens_at] - 1e-3
    first = next((place for place, found in enumerate(readings) if found > cut), ANSWER)
    if any(abs(found - cut) < 5e-4 for found in readings):
        return  # float32 in the memory could decide
    plan = replace(plan, gates=(*plan.gates[:2], replace(answer, cut=np.array([cut], np.float32))))
    bank = PlanBank(SPEC, SITES, rows=3, requests=BATCH)
    bank.keep_memory(128)
    bank.load(plan)
    assert bank.digest(plan.revision) == plan.digest()
    expected = [place >= PROMPT + first for place in range(TOTAL)]
    slots = torch.from_numpy(np.random.default_rng(seed).permutation(128))

    def go(begin: int) -> list[bool]:
        seen: list[bool] = []
        while begin + len(seen) < TOTAL:
            at = begin + len(seen)
            end = data.draw(st.integers(at + 1, TOTAL), label="chunk end")
            seen += run(bank, plan, x, at, end, slots).tolist()
        return seen

    assert go(0) == expected
    # Another request finds all but the last prompt tokens cached, in the same slots.
    bank.step.forget_request(1)
    cached = data.draw(st.integers(1, PROMPT - 1), label="cached tokens")
    assert go(cached) == expected[cached:]
    # Preempted: recomputed in other slots.
    slots = slots.flip(0)
    assert go(0) == expected


def test_answer_that_cannot_be_read_opens_the_gate() -> None:
    """A lost reading in the window, or too many tokens above the norm bound, opens the gate; a lost reading
    before the window does not."""
    x = {site: torch.full((TOTAL, 6), 0.1) for site in SITES}
    gates = (
        ALWAYS,
        probe_gate(1, 1e6, SITES[:1], scope="prompt"),
        probe_gate(0, 1e6, SITES, scope="answer", window=3, max_norm=5.0),
    )
    plan = Plan("p", "t", SPEC, {}, gates)
    slots = torch.arange(64)
    for lost, expected in ((PROMPT, False), (PROMPT + 3, True)):
        bank = PlanBank(SPEC, SITES, rows=3, requests=BATCH)
        bank.keep_memory(64)
        bank.load(plan)
        assert not run(bank, plan, x, 0, PROMPT + 4, slots).any()
        assert bank.step.memory is not None
        bank.step.memory[lost] = math.nan
        assert run(bank, plan, x, PROMPT + 4, PROMPT + 5, slots).tolist() == [expected]
    wide = replace(gates[2], window=9)
    plan = replace(plan, gates=(*gates[:2], wide))
    bank.load(plan)
    bank.step.forget_request(1)
    x = {site: torch.full((TOTAL, 6), 9.0) for site in SITES}
    opened = run(bank, plan, x, 0, TOTAL, slots).tolist()
    assert opened == [False] * (PROMPT + 4) + [True] * (ANSWER - 4)


def test_answer_gate_beside_a_lost_prompt_reading_opens() -> None:
    """If the prompt's reading is unknown, the first generated token opens the gate."""
    x = {site: torch.full((TOTAL, 6), 0.1) for site in SITES}
    beside = probe_gate(0, 1e6, SITES, scope="answer", window=3, beside=1, prompt_weight=1.0)
    plan = Plan("p", "t", SPEC, {}, (ALWAYS, probe_gate(1, 1e6, SITES[:1], scope="prompt"), beside))
    bank = PlanBank(SPEC, SITES, rows=3, requests=BATCH)
    bank.keep_memory(64)
    bank.load(plan)
    slots = torch.arange(64)
    assert not run(bank, plan, x, 0, PROMPT + 1, slots).any()
    bank.step.forget_request(1)
    assert run(bank, plan, x, PROMPT + 1, PROMPT + 2, slots).all()


def test_composed_plan_keeps_the_gate_beside() -> None:
    """In a composed plan the gate beside is still the part's own prompt gate."""
    prompt = probe_gate(1, 1e6, SITES[:1], scope="prompt")
    answer = probe_gate(0, 1e6, SITES, scope="answer", window=3, beside=1, prompt_weight=1.0)
    plans = [
        Plan("a", "t", SPEC, {}, (ALWAYS, prompt)),
        Plan("b", "t", SPEC, {}, (ALWAYS, prompt, answer)),
    ]
    composed = compose_plans(plans)
    assert composed.gates[3].beside == 2
    assert composed.gates[2] is prompt


def test_passes_with_an_answer_gate_stay_out_of_graphs() -> None:
    """The gate must read at every generated token, so no pass of its requests is replayed."""
    answer = probe_gate(0, 1e6, SITES, scope="answer", window=3)
    plan = Plan("p", "t", SPEC, {}, (ALWAYS, answer))
    bank = PlanBank(SPEC, SITES, rows=3, requests=BATCH, graph_tokens=8)
    bank.load(plan)
    assert not bank.may_replay([plan.revision], [False])
    assert bank.may_replay([None], [False])
