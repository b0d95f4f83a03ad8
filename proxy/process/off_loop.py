"""Runs work in a thread, or on the event loop if no thread can be started: for work that must be done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def off_loop(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """The work's result, from a thread of the loop's pool, or run here if no thread can be started.

    A pool that could not start a thread may still run the work later: it must be safe to run twice.
    """
    loop = asyncio.get_running_loop()
    try:
        done = loop.run_in_executor(None, partial(work, *args, **kwargs))
    except RuntimeError:
        # This blocks the event loop, which is better than not doing the work.
        return work(*args, **kwargs)
    return await done
