"""Gateways that share an engine do not retire each other's plans, and leave none behind."""

from steering_kernels.vllm_plugin.core.holders import LEASE_S, Holders


def test_plan_stays_while_any_gateway_holds_it() -> None:
    """A plan is retired only when the last gateway that loaded it releases it."""
    holders = Holders()
    holders.hold("a", "r1")
    holders.hold("b", "r1")
    assert not holders.release("a", "r1")
    assert holders.release("b", "r1")
    assert holders.release("a", "unknown")


def test_gateway_with_an_expired_lease_holds_nothing() -> None:
    """When its lease expires, plans that only it held are retired; others stay."""
    now = [0.0]
    holders = Holders(lambda: now[0])
    holders.renew("a")
    holders.renew("b")
    holders.hold("a", "r1")
    holders.hold("a", "r2")
    holders.hold("b", "r2")
    now[0] = LEASE_S
    holders.renew("b")
    assert holders.orphans() == []
    now[0] = LEASE_S + 1
    assert holders.orphans() == ["r1"]
    assert holders.orphans() == []
    assert holders.release("b", "r2")
