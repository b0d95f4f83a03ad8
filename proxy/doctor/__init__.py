"""`mechctl doctor`: checks all that `mechctl serve` needs, before anybody depends on it."""

from proxy.doctor.examination import examine
from proxy.doctor.finding import Finding, State

__all__ = ["Finding", "State", "examine"]
