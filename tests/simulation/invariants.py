"""Invariants that must hold at every moment of every run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy.errors import Refusal
from simulation.asks import Ask
from simulation.clock import Clock
from simulation.engine import Generation
from simulation.scenario import BODY_TIMEOUT_S, REQUEST_TIMEOUT_S, Scenario

_EXPECTED = ("RuntimeError",)
"""Tasks that may fail when no thread can be started."""
_SLACK_S = 2 * BODY_TIMEOUT_S


@dataclass
class Invariants:
    """Observes events, and collects violations."""

    scenario: Scenario
    clock: Clock
    violations: list[str] = field(default_factory=list)
    steps: int = 0
    generations: dict[int, Generation] = field(default_factory=dict)
    tenant_of: dict[str, str] = field(default_factory=dict)
    """Request number to its tenant."""
    policy_of: dict[str, str] = field(default_factory=dict)
    """Revision to its policy."""
    served: dict[str, list[tuple[float, str]]] = field(default_factory=lambda: defaultdict(list))
    """Policy to its active revisions, and since when."""
    shadowed: dict[str, float] = field(default_factory=dict)
    """Revisions that were shadows, and until when."""
    proven_boots: set[str] = field(default_factory=set)
    refused_residency: dict[str, Callable[[], bool]] = field(default_factory=dict)
    """Requests refused as not resident by the last engine they were sent to, and whether the gateway cut that
    connection before it could read the refusal."""
    log_deleted_at: float | None = None
    """When the audit log was last deleted."""
    _watched_since: float = 0.0
    clock_was_set: bool = False
    gateway: Any = None
    """The running `Gateway`, if any."""

    def fail(self, what: str) -> None:
        """Record a violation."""
        if len(self.violations) < 20:
            self.violations.append(f"at {self.clock.now - 1000:.3f} s: {what}")

    def watch(self, gateway: Any) -> None:
        """A gateway has started."""
        self.gateway = gateway
        self._watched_since = self.clock.now
        compositions = gateway.catalogue.compositions
        swap = compositions.swap

        def swap_and_note(made: Mapping[str, Any]) -> None:
            swap(made)
            for name, revision in made.items():
                self._serve(name, revision.revision)

        # No log line reports them.
        compositions.swap = swap_and_note
        if gateway.audit is not None:
            require = gateway.audit.require

            def require_and_check() -> None:
                try:
                    require()
                except Refusal:
                    if not gateway.readiness.reasons():
                        self.fail("requests are refused for the audit log, but the gateway is ready")
                    raise

            gateway.audit.require = require_and_check

    def step(self, _what: str) -> None:
        """Called after every event."""
        self.steps += 1
        if self.gateway is None:
            return
        self._look_at_revisions()
        self._check_concurrency()

    def began(self, generation: Generation) -> None:
        """An engine started a generation."""
        self.generations[generation.number] = generation
        if generation.ask is None:
            return
        ask = generation.ask
        others = [g for g in self.generations.values() if g.ask == ask and g is not generation]
        if self.gateway is not None:
            self._look_at_revisions()
        if self._is_shadow(generation, others):
            generation.ask, generation.shadow_of = None, ask
            return
        if others:
            self.fail(f"ask{ask} was generated twice, by {others[0].engine} and {generation.engine}")
        self._check_rate(generation)
        self._check_budget(generation)

    def _is_shadow(self, generation: Generation, others: list[Generation]) -> bool:
        """Whether an answered request runs a second time, on the same engine, as its policy's shadow."""
        if len(others) != 1 or any(g.shadow_of == generation.ask for g in self.generations.values()):
            return False
        first = others[0]
        # The shadow is chosen when the request is accepted, however long it then waits for an engine.
        accepted_at = first.began_at - REQUEST_TIMEOUT_S
        return (
            (first.whole and first.ended_at is not None)
            and first.engine == generation.engine
            and first.sealed != generation.sealed
            and self.shadowed.get(generation.sealed, 0.0) >= accepted_at
        )

    def logged(self, entry: Mapping[str, Any]) -> None:
        """Check a line of the gateway's log."""
        event = entry.get("event")
        if event == "engine_ready":
            self.proven_boots.add(entry["boot_id"])
        elif event == "unforeseen" and entry.get("kind") not in _EXPECTED:
            self.fail(
                f"an unforeseen error: {entry.get('kind')} in {entry.get('place')} {entry.get('error')}"
            )
        elif event == "task_failed" and entry.get("kind") not in _EXPECTED:
            self.fail(f"the task {entry.get('task')} failed: {dict(entry)}")
        elif event == "policy_active":
            self._serve(entry["policy"], entry["revision"])

    def answered(self, ask: Ask) -> None:
        """A client's request has ended."""
        self.step(ask.request_id)
        required = self.scenario.required(ask.tenant, ask.route, ask.model, ask.choice)
        name = f"{ask.request_id} ({ask.tenant}, {ask.route}, stream={ask.stream})"
        marks = ask.marks
        unread = self.refused_residency.get(str(ask.number))
        if unread is not None and not unread() and ask.whole and ask.status not in (503, 200):
            self.fail(f"{name}: a revision that an engine does not hold gave {ask.status}")
        if not marks:
            if ask.whole and ask.status == 200 and not ask.stream:
                self.fail(f"{name}: answered with nothing of an engine's")
            return
        if len(marks) > 1:
            self.fail(f"{name}: bytes of {len(marks)} generations in one answer")
        generation = self.generations[min(marks)]
        if generation.ask != str(ask.number):
            self.fail(f"{name}: got the answer to ask{generation.ask}")
        self._check_revision(name, ask, generation, required)
        if generation.boot_id not in self.proven_boots:
            self.fail(f"{name}: answered by {generation.boot_id}, which never proved itself")
        if not ask.stream and not generation.proven:
            self.fail(f"{name}: bytes of an answer whose receipt proves nothing")
        if ask.stream and ask.ended_cleanly and not generation.proven:
            self.fail(f"{name}: a stream ended cleanly without proof")
        if ask.whole and (not ask.stream or ask.ended_cleanly):
            self._check_receipt(name, ask, generation)

    def _check_revision(self, name: str, ask: Ask, generation: Generation, required: str | None) -> None:
        if required is None:
            self.fail(f"{name}: answered, but its choice is not open to it")
            return
        sealed = generation.sealed
        policy = "none" if sealed == "none" else self.policy_of.get(sealed, "a policy that is unknown")
        if policy != required:
            self.fail(f"{name}: {required} is required, but it was generated under {policy}")
        label = "none" if sealed == "none" else f"{required}@{sealed[:12]}"
        if ask.status == 200 and ask.headers.get("x-steering-policy") != label:
            reported = ask.headers.get("x-steering-policy")
            self.fail(f"{name}: generated under {label}, but reported to be under {reported}")
        if sealed != "none" and not self._was_active(policy, sealed, ask.sent_at, generation.began_at):
            self.fail(f"{name}: generated under {sealed[:12]} of {policy}, which did not serve then")

    def _check_receipt(self, name: str, ask: Ask, generation: Generation) -> None:
        reported = ask.headers.get("x-steering-receipt", "")
        if ask.stream:
            found = ask.body.partition(b": steering-receipt ")[2].partition(b"\n")[0]
            reported = found.decode()
        try:
            receipt = json.loads(reported)
        except ValueError:
            self.fail(f"{name}: no receipt, but {reported[:80]!r}")
            return
        if receipt["revision"] != generation.sealed:
            self.fail(f"{name}: its receipt is for {receipt['revision'][:12]}")
        if receipt["requests"] != generation.answers:
            self.fail(f"{name}: its receipt is for {receipt['requests']} requests")

    def _look_at_revisions(self) -> None:
        """Record the active revisions: log lines do not report compositions and shadows."""
        for entry in self.gateway.catalogue.entries.values():
            if entry.shadow is not None:
                self.shadowed[entry.shadow.revision] = self.clock.now
        for revision in self.gateway.catalogue.required_revisions:
            history = self.served[revision.policy]
            if not history or history[-1][1] != revision.revision:
                self._serve(revision.policy, revision.revision)

    def _serve(self, policy: str, revision: str) -> None:
        self.policy_of[revision] = policy
        self.served[policy].append((self.clock.now, revision))

    def _was_active(self, policy: str, revision: str, start: float, end: float) -> bool:
        history = self.served[policy]
        for index, (since, name) in enumerate(history):
            until = history[index + 1][0] if index + 1 < len(history) else self.clock.now
            if name == revision and since <= end + 0.5 and until >= start:
                return True
        return False

    def _check_concurrency(self) -> None:
        held: dict[str, int] = defaultdict(int)
        for generation in self.running:
            if generation.ask is not None and not generation.given_up():
                held[self.tenant_of[generation.ask]] += generation.answers
        for tenant, number in held.items():
            most = self.scenario.limits(tenant).get("concurrency")
            if most is not None and number > most:
                self.fail(f"{number} answers of {tenant} run at once, but it may have {most}")

    @property
    def running(self) -> list[Generation]:
        """Generations in progress."""
        return [g for g in self.generations.values() if g.ended_at is None]

    def _of_tenant(self, tenant: str) -> list[Generation]:
        return [g for g in self.generations.values() if g.ask is not None and self.tenant_of[g.ask] == tenant]

    def _check_rate(self, generation: Generation) -> None:
        assert generation.ask is not None
        tenant = self.tenant_of[generation.ask]
        most = self.scenario.limits(tenant).get("requests_per_minute")
        if most is None:
            return
        # Buckets are full when a gateway starts.
        mine = [g for g in self._of_tenant(tenant) if g.began_at >= self._watched_since]
        for index, first in enumerate(mine):
            span = generation.began_at - first.began_at + _SLACK_S
            number = sum(g.answers for g in mine[index:])
            if number > most + span * most / 60 + 1:
                self.fail(f"{number} answers of {tenant} in {span:.1f} s, but it may have {most} a minute")
                return

    def _check_budget(self, generation: Generation) -> None:
        assert generation.ask is not None
        tenant = self.tenant_of[generation.ask]
        most = self.scenario.limits(tenant).get("token_budget")
        if most is None or self.clock_was_set:
            return
        settled = generation.began_at - 1.0 - 2 * BODY_TIMEOUT_S
        used = sum(
            g.tokens
            for g in self._of_tenant(tenant)
            if g.whole and g.told_true and g.ended_at and g.ended_at < settled
        )
        if used >= most:
            self.fail(f"{tenant} had used {used} tokens of its budget of {most}, and was served more")
