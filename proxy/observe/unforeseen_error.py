"""What may be logged of an unexpected error: type and place, never its text, which may quote a request."""

from __future__ import annotations

from interpretops.errors import InterpretOpsError


def describe_error(error: BaseException) -> dict[str, str | None]:
    """``kind`` (type), ``place`` (function and line) and ``error`` (text; only of our own errors)."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "?" if trace is None else f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}"
    text = str(error) if isinstance(error, InterpretOpsError) else None
    return {"kind": type(error).__name__, "place": place, "error": text}
