"""The engine model: what it holds, generates under which revision, and attests."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from interpretops.engine_api import (
    PASS_THROUGH,
    Attestation,
    EngineCode,
    EngineMessage,
    EngineRefusal,
    LoadedPlan,
    Rank,
    RankDigest,
    RankGroup,
    Receipt,
    ResidentPlan,
    RetiredPlan,
    SpecialTokenList,
    describe_model,
)
from interpretops.plan import POINTS, ModelSpec, read_plan
from simulation.clock import Clock
from steering_kernels.vllm_plugin.core.holders import Holders

MODEL = "tiny-model"
SPEC = ModelSpec(MODEL, "f" * 64, "LlamaForCausalLM", 8, 4, 2, 2, 4, 32)
PROMPT_TOKENS = 3
ROOM = 30
_DIGESTS: dict[str, str] = {}
"""Cache of parsed plans, by content hash."""


@dataclass(eq=False)
class Generation:
    """One request that reached an engine, and what was really done for it."""

    number: int
    engine: str
    boot_id: str
    ask: str | None
    """Number of the client's request, from the mark in its text. None: the gateway's own."""
    sealed: str
    """The revision that the gateway required."""
    applied: str
    """The revision that edited the activations."""
    nonce: str
    began_at: float
    prompts: int
    choices: int
    written: int
    """Tokens of each choice."""
    proven: bool = True
    """Whether the receipt sent proves that ``sealed`` was applied to all of it."""
    told_true: bool = True
    """Whether the receipt sent is accurate; otherwise the charge is unpredictable."""
    whole: bool = False
    """Whether all of it was sent."""
    ended_at: float | None = None
    shadow_of: str | None = None
    """Number of the client's request that this shadow request repeats."""
    given_up: Callable[[], bool] = lambda: False
    """Whether the gateway closed the connection."""

    @property
    def mark(self) -> str:
        """Text in every piece of its answer."""
        return f"<g{self.number}>"

    @property
    def answers(self) -> int:
        """Its size as counted by limits."""
        return self.prompts * self.choices

    @property
    def tokens(self) -> int:
        """Tokens that passed through the model."""
        return self.answers * (PROMPT_TOKENS + self.written - 1)

    def receipt(self) -> Receipt:
        """The correct receipt."""
        return Receipt(
            revision=self.applied,
            requests=self.answers,
            tokens_evaluated=self.tokens,
            edits_applied=0 if self.applied == PASS_THROUGH else self.tokens,
            finished=True,
        )


@dataclass
class _Resident:
    digest: str
    running: int = 0
    retired: bool = False


@dataclass(eq=False)
class EngineModel:
    """One engine; a restart is another boot of the same one."""

    name: str
    clock: Clock
    chance: random.Random
    count: list[int]
    """Generations so far, of all engines."""
    boot_id: str = ""
    started: bool = False
    listening: bool = True
    hangs: bool = False
    """Accepts requests without ever answering."""
    sick: bool = False
    """Its health check fails."""
    steers: bool = True
    """Whether its self-test passes."""
    damaged: bool = False
    """Attests a wrong digest."""
    room: int = ROOM
    """Most plans that fit in its tables."""
    boots: int = 0
    plans: dict[str, _Resident] = field(default_factory=dict)
    receipts: dict[str, Receipt] = field(default_factory=dict)
    old_receipts: list[Receipt] = field(default_factory=list)
    """Generations of earlier boots."""
    generations: list[Generation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.boot()

    def boot(self) -> None:
        """Restart with empty tables."""
        self.boots += 1
        self.boot_id = f"{self.name}-boot{self.boots}"
        self.old_receipts += [generation.receipt() for generation in self.generations[-3:]]
        self.plans, self.receipts = {}, {}
        self.holders = Holders(self.clock.monotonic)
        self.hangs = self.sick = self.damaged = False
        self.room = ROOM
        self.steers = True

    @property
    def resident(self) -> dict[str, str]:
        """Admissible revisions, to digest."""
        return {name: plan.digest for name, plan in self.plans.items() if not plan.retired}

    def load(self, holder: str, revision: str, data: bytes) -> tuple[int, EngineMessage]:
        """Make a plan resident."""
        if hashlib.sha256(data).hexdigest() != revision:
            return refuse(EngineCode.INVALID_PLAN)
        if revision not in self.plans and len(self.plans) >= self.room:
            return refuse(EngineCode.TABLE_FULL)
        if revision not in _DIGESTS:
            _DIGESTS[revision] = read_plan(data).digest()
        digest = "0" * 64 if self.damaged else _DIGESTS[revision]
        self.plans.setdefault(revision, _Resident(digest)).retired = False
        self.holders.renew(holder)
        self.holders.hold(holder, revision)
        return 200, LoadedPlan(revision=revision, ranks=[RankDigest(rank=0, digest=digest)])

    def retire(self, holder: str, revision: str) -> tuple[int, EngineMessage]:
        """Retire a plan, unless another gateway holds it."""
        running = 0
        if self.holders.release(holder, revision):
            running = self._retire(revision)
        return 200, RetiredPlan(revision=revision, in_flight=running)

    def _retire(self, revision: str) -> int:
        plan = self.plans.get(revision)
        if plan is None:
            return 0
        plan.retired = True
        self._free(revision)
        return plan.running

    def _free(self, revision: str) -> None:
        plan = self.plans.get(revision)
        if plan is not None and plan.retired and not plan.running:
            del self.plans[revision]

    def attest(self, holder: str) -> Attestation:
        """The attestation; first retires what no live gateway holds."""
        self.holders.renew(holder)
        for revision in self.holders.orphans():
            self._retire(revision)
        model = describe_model(SPEC)
        points: list[str] = list(POINTS)
        admitted = {
            name: ResidentPlan(digest=plan.digest, in_flight=plan.running, retired=plan.retired)
            for name, plan in self.plans.items()
        }
        ranks = [Rank(rank=0, resident=self.resident, model=model, points=points)]
        return Attestation(
            plugin_version="0",
            vllm_version="0",
            boot_id=self.boot_id,
            model=model,
            points=points,
            engines=[RankGroup(ranks=ranks, resident=admitted)],
            special_tokens=SpecialTokenList(ids={"<|end|>": 0, "<|begin|>": 1}, first=1),
        )

    def lose_a_plan(self) -> None:
        """Lose one plan, as after a worker fault."""
        if self.plans:
            del self.plans[self.chance.choice(sorted(self.plans))]

    def admits(self, revision: str) -> bool:
        """Whether requests may use the revision."""
        return revision == PASS_THROUGH or revision in self.resident

    def begin(
        self, ask: str | None, revision: str, nonce: str, prompts: int, choices: int, written: int
    ) -> Generation:
        """Start an admitted request."""
        self.count[0] += 1
        generation = Generation(
            number=self.count[0],
            engine=self.name,
            boot_id=self.boot_id,
            ask=ask,
            sealed=revision,
            applied=revision,
            nonce=nonce,
            began_at=self.clock.now,
            prompts=prompts,
            choices=choices,
            written=written,
        )
        self.generations.append(generation)
        if revision in self.plans:
            self.plans[revision].running += 1
        return generation

    def end(self, generation: Generation) -> None:
        """End a request, finished or aborted."""
        if generation.ended_at is not None:
            return
        generation.ended_at = self.clock.now
        plan = self.plans.get(generation.sealed)
        if plan is not None and generation.boot_id == self.boot_id and plan.running:
            plan.running -= 1
            self._free(generation.sealed)


def refuse(code: EngineCode) -> tuple[int, EngineRefusal]:
    """Status and body of a plugin refusal."""
    return code.status, EngineRefusal.of(code, f"refused: {code.value}")
