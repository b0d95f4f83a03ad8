"""Gateways that share an engine do not take plans from each other, and leave none behind."""

from steering_kernels.vllm_plugin.core.holders import LEASE_S, Holders


def test_plan_stays_as_long_as_one_gateway_holds_it() -> None:
    """Only the last of those that loaded it lets go of it for good."""
    holders = Holders()
    holders.hold("a", "r1")
    holders.hold("b", "r1")
    assert not holders.release("a", "r1")
    assert holders.release("b", "r1")
    assert holders.release("a", "unknown")


def test_gateway_that_is_gone_holds_nothing() -> None:
    """After its lease what it alone held is retired, and what others hold stays."""
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
