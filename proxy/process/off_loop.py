"""Runs work beside the event loop that must be done even where no thread can be had for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def off_loop(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """The work's result, from a thread of the loop's pool; without a thread it is done at once, here.

    A pool that finds no thread may still do what it was given later: the work must bear to be done twice.
    """
    loop = asyncio.get_running_loop()
    try:
        done = loop.run_in_executor(None, partial(work, *args, **kwargs))
    except RuntimeError:
        # Everything waits for it then, which is better than that it is not done.
        return work(*args, **kwargs)
    return await done
