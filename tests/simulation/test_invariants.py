"""The invariants distinguish violations from harmless look-alikes."""

from types import SimpleNamespace
from typing import Any

import pytest


@pytest.mark.usefixtures("simulation")
@pytest.mark.parametrize(
    ("sealed", "engine", "violations"),
    [
        (["active", "waiting"], "e0", 0),
        (["active", "active"], "e0", 1),
        (["active", "another"], "e0", 1),
        (["active", "waiting"], "e1", 1),
        (["active", "waiting", "waiting"], "e0", 1),
    ],
)
def test_request_is_generated_once_and_once_more_by_its_shadow(
    sealed: list[str], engine: str, violations: int
) -> None:
    """A second generation is a violation unless it is the shadow's, once, on the same engine."""
    from simulation.clock import Clock
    from simulation.engine import Generation
    from simulation.invariants import Invariants
    from simulation.scenario import Scenario

    scenario = Scenario(bindings=[], engines=2, keys=False, audit=False, clients=1, active_s=1.0)
    invariants = Invariants(scenario, Clock())
    invariants.tenant_of["7"] = "anonymous"
    entry = SimpleNamespace(shadow=SimpleNamespace(revision="waiting"))
    catalogue: Any = SimpleNamespace(entries={"alpha": entry}, required_revisions=())
    invariants.gateway = SimpleNamespace(catalogue=catalogue)
    for number, revision in enumerate(sealed):
        generation = Generation(
            number=number,
            engine=engine if number else "e0",
            boot_id="boot",
            ask="7",
            sealed=revision,
            applied=revision,
            nonce=str(number),
            began_at=1000.0,
            prompts=1,
            choices=1,
            written=1,
        )
        invariants.began(generation)
        generation.whole, generation.ended_at = True, 1000.0
    assert len(invariants.violations) == violations
