"""Compiling a policy against a model and its artifacts into a plan, or every fault and its place."""

from interpretops.compile.compiler import compile_policy

__all__ = ["compile_policy"]
