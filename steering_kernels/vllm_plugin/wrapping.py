"""Wraps methods of vLLM, once per process, and only if the method exists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "__interpretops_wrapped__"


def wrap_method(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by a call of ``wrapper(original, self, …)``. Repeated calls do nothing.

    Raises RuntimeError if the class itself has no such method: the vLLM version is then not supported.
    """
    original = owner.__dict__.get(name)
    if original is None:
        raise RuntimeError(
            f"vllm's {owner.__module__}.{owner.__qualname__} has no method {name!r}: "
            "the interpretops plugin does not support this version of vllm"
        )
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)
