"""The engines of `tests/support/engines.py` as fixtures."""

from engines import engine_server, make_plan, run_engine, spec

__all__ = ["engine_server", "make_plan", "run_engine", "spec"]
