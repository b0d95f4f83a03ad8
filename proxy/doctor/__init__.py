"""`mechctl doctor`: checks everything that `mechctl serve` needs before you rely on it."""

from proxy.doctor.examination import examine
from proxy.doctor.finding import Finding, State

__all__ = ["Finding", "State", "examine"]
