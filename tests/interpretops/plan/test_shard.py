"""Plans cut for two ranks: together they do what the whole does, and each proves its own part."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import Tensor

from interpretops.errors import PlanError
from interpretops.plan import (
    ALWAYS,
    Gate,
    HeadScaling,
    ModelSpec,
    Plan,
    Point,
    ProbePart,
    Site,
    SiteEdits,
    TopK,
    Units,
)
from interpretops.plan.shard import Shard
from interpretops.steering.plan_bank import PlanBank
from steering_kernels.ops import apply_edits, update_gates

SPEC = ModelSpec("m", "0" * 64, "LlamaForCausalLM", 12, 2, 4, 2, 6, 50)
HEADS, OUT = Site(0, "attn_z"), Site(0, "attn_proj")
TOKENS = 9


def make_plan(rng: np.random.Generator) -> Plan:
    """Every kind of unit at both points: norm-bounded, TopK, behind gates on the heads, reading one head."""

    def edits(site: Site, scale: HeadScaling | None) -> SiteEdits:
        count, width, read_width = 6, SPEC.width(site.point), SPEC.read_width(site.point)
        infinite = np.full(count, np.inf)
        read = rng.normal(size=(count, read_width))
        read[1, : SPEC.head_dim * 3] = 0  # only the last head: the first rank has nothing to read
        read[3] = 0  # a steering vector
        values = {
            "read": read,
            "write": rng.normal(size=(count, width)),
            "bias": rng.normal(size=count),
            "threshold": np.array([-np.inf, 0, 0, -np.inf, 0, -np.inf]),
            "gain": np.array([-0.7, 1, 0, 0, -1, 0.5]),
            "offset": np.array([0, 0, 0, 1.5, 0, 0]),
            "low": np.array([-np.inf, -np.inf, -0.2, -np.inf, -np.inf, -np.inf]),
            "high": np.array([np.inf, np.inf, 0.2, np.inf, np.inf, np.inf]),
            "max_norm": np.where(np.arange(count) % 2 == 0, 4.8, infinite),
        }
        rows, bias = (rng.normal(size=size).astype(np.float32) for size in ((5, read_width), (5,)))
        topk = TopK(rows, bias, 2)
        return SiteEdits(
            Units(
                **{name: value.astype(np.float32) for name, value in values.items()},
                gate=np.array([0, 1, 2, 0, 2, 1], np.int32),
                topk=np.array([-1, -1, -1, -1, 3, -1], np.int32),
            ),
            scale,
            topk,
        )

    delta = np.zeros((2, 4, 6), np.float32)
    delta[0, 0], delta[1, 3] = -0.5, 1.0
    scale = HeadScaling(delta.reshape(2, -1), np.array([0, 1], np.int32))
    read = rng.normal(size=(2, 24)).astype(np.float32)
    none = np.zeros(2, np.float32)
    gates = (
        ALWAYS,
        Gate(HEADS, read, none, none, latched=True, max_norm=5.2),
        Gate(HEADS, read[::-1].copy(), none, none + 1, combine="all"),
    )
    return Plan("split", "test", SPEC, {HEADS: edits(HEADS, scale), OUT: edits(OUT, None)}, gates)


def run(bank: PlanBank, revision: str, z: Tensor, out: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both sites of a layer over one pass; the edited heads and output, and how many edits were counted."""
    bank.begin_step(
        revisions=[revision, None],
        slots=[0, 1],
        num_tokens=[TOKENS - 2, 2],
        first_position=[0, 0],
        prompt_length=[TOKENS, TOKENS],
    )
    update_gates(z, bank.gates_at[HEADS], bank.step)
    edited, out = z.clone(), out.clone()
    apply_edits(edited, bank.tables[HEADS], bank.step)
    apply_edits(out, bank.tables[OUT], bank.step, source=edited)
    return edited, out, int(bank.step.edited[0])


def sums(count: int) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """An all-reduce over threads; it breaks when one of them stays away."""
    parts: list[Tensor] = [torch.zeros(0)] * count
    barrier = Barrier(count)

    def of(index: int) -> Callable[[Tensor], Tensor]:
        def total(part: Tensor) -> Tensor:
            parts[index] = part
            barrier.wait(10)
            whole = torch.stack(list(parts)).sum(dim=0)
            barrier.wait(10)
            return whole

        return total

    return of


@pytest.mark.parametrize("seed", range(8))
def test_ranks_together_do_what_the_whole_does(seed: int) -> None:
    """Each rank's columns of the heads, the output on both, and the count of edits are those of one rank."""
    plan = make_plan(np.random.default_rng(seed))
    chance = torch.Generator().manual_seed(seed)
    z, out = (torch.randn(TOKENS, width, generator=chance) for width in (24, 12))
    whole = PlanBank(SPEC, [HEADS, OUT])
    whole.load(plan)
    expected = run(whole, plan.revision, z, out)
    assert not torch.equal(expected[0], z)
    assert not torch.equal(expected[1], out)
    over = sums(2)

    def rank(index: int) -> tuple[Tensor, Tensor, int]:
        shard = Shard(index, 2)
        bank = PlanBank(shard.of_model(SPEC), [HEADS, OUT], sum_ranks=over(index))
        bank.load(shard.of_plan(plan), plan.revision)
        return run(bank, plan.revision, z[:, index * 12 : (index + 1) * 12].contiguous(), out)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(rank, range(2))
    torch.testing.assert_close(torch.cat([first[0], second[0]], dim=1), expected[0], rtol=0, atol=1e-6)
    for half in (first, second):
        torch.testing.assert_close(half[1], expected[1], rtol=0, atol=1e-6)
        assert half[2] == expected[2]


def test_digest_of_a_rank_is_that_of_its_shard() -> None:
    """What a rank's tables hold proves its own half of the plan, and no other half nor a changed one."""
    plan = make_plan(np.random.default_rng(0))
    digests = []
    for index in range(2):
        shard = Shard(index, 2)
        bank = PlanBank(shard.of_model(SPEC), [HEADS, OUT], sum_ranks=lambda part: part)
        bank.load(shard.of_plan(plan), plan.revision)
        digests.append(bank.digest(plan.revision))
        assert digests[-1] == shard.of_plan(plan).digest()
        bank.tables[HEADS].read[0, 0] += 1
        assert bank.digest(plan.revision) != digests[-1]
    assert len({*digests, plan.digest()}) == 3


def test_one_rank_has_the_plan_itself() -> None:
    """Without tensor parallelism nothing is cut, and points other than the heads' never are."""
    plan = make_plan(np.random.default_rng(0))
    assert Shard().of_plan(plan) is plan
    elsewhere = replace(plan, edits={Site(1, "mlp_out"): plan.edits[OUT]}, gates=plan.gates[:1])
    assert Shard(1, 2).of_plan(elsewhere).digest() == elsewhere.digest()


@pytest.mark.parametrize("point", ["attn_z", "attn_proj"])
def test_prompt_gate_on_split_heads_is_refused(point: Point) -> None:
    """What is kept of a token is a rank's own; elsewhere, and on one rank, such a gate is as any other."""
    plan = make_plan(np.random.default_rng(0))
    none = np.zeros((0, 0), np.float32)

    def gated(site: Site) -> Plan:
        heads = np.ones((1, SPEC.read_width(site.point)), np.float32)
        part = ProbePart(site, heads, heads, np.zeros(1, np.float32))
        one = np.zeros(1, np.float32)
        gate = Gate(site, none, np.zeros(0, np.float32), one, scope="prompt", latched=True, probe=(part,))
        return replace(plan, edits={}, gates=(ALWAYS, gate))

    with pytest.raises(PlanError, match=rf"an attention probe that reads at \['0.{point}'\]"):
        Shard(0, 2).of_plan(gated(Site(0, point)))
    assert Shard().of_plan(gated(Site(0, point))).gates[1].probe
    assert Shard(0, 2).of_plan(gated(Site(0, "resid_post"))).gates[1].probe
