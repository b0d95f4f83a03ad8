"""Compiles a policy into a plan for one model and its artifacts, or reports every fault and its location."""

from interpretops.compile.compiler import compile_policy

__all__ = ["compile_policy"]
