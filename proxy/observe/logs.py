"""Structured logs: one JSON object per line on standard error; never a prompt, an answer or a key."""

from __future__ import annotations

import sys

import structlog
from structlog.typing import FilteringBoundLogger


def make_logger(*, json_lines: bool = True) -> FilteringBoundLogger:
    """The gateway's logger."""
    renderer = structlog.processors.JSONRenderer() if json_lines else structlog.dev.ConsoleRenderer()
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
    )
    # Bind once here instead of on every line.
    return logger.bind()
