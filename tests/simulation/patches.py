"""Replaces time, randomness, disk and file notifications beneath the gateway's code."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as real_datetime
import errno
import functools
import gc
import os
import random
import secrets
import sys
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp.connector
import aiohttp.web_app
import watchfiles

from simulation.clock import REAL_CLOCKS, Clock, datetime_by

_OURS = ("proxy.", "interpretops.", "steering_kernels.")


class Disk:
    """The disk beneath the gateway's files."""

    def __init__(self) -> None:
        self.full = False
        self.torn = False
        """Whether a partial line is written before it is full."""

    def check(self) -> None:
        """Raise if the disk is full."""
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Notices:
    """File notifications, which the system may omit."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Notify of a change."""
        self._event.set()

    async def watch(self, *_paths: Any, **_options: Any) -> AsyncIterator[set[Any]]:
        """As `watchfiles.awatch`."""
        while True:
            await self._event.wait()
            self._event.clear()
            yield set()


@contextlib.contextmanager
def patched(clock: Clock, chance: random.Random, disk: Disk, notices: Notices) -> Iterator[None]:
    """Within the block, nothing in this process depends on real time, randomness or disk."""
    with contextlib.ExitStack() as stack:
        _patch_time(stack, clock)
        _patch_chance(stack, chance)
        _patch_disk(stack, disk)
        put(stack, watchfiles, "awatch", notices.watch)
        # It would keep the gateways of a thousand seeds, and everything they reference, in memory.
        stack.callback(aiohttp.web_app._cached_build_middleware.cache_clear)
        # Otherwise garbage collection would depend on everything the process did before.
        gc.disable()
        stack.callback(gc.enable)
        yield


def put(stack: contextlib.ExitStack, holder: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack closes."""
    stack.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, value)


def _patch_time(stack: contextlib.ExitStack, clock: Clock) -> None:
    ours = {real: getattr(clock, name) for real, name in REAL_CLOCKS.items()}
    for function in _our_functions():
        defaults = function.__defaults__ or ()
        if any(default in ours for default in defaults if callable(default)):
            put(stack, function, "__defaults__", tuple(_swap(ours, default) for default in defaults))
        named = function.__kwdefaults__ or {}
        if any(default in ours for default in named.values() if callable(default)):
            put(stack, function, "__kwdefaults__", {k: _swap(ours, value) for k, value in named.items()})
    virtual = datetime_by(clock)
    for module in _our_modules():
        if getattr(module, "datetime", None) is real_datetime.datetime:
            put(stack, module, "datetime", virtual)
    put(stack, aiohttp.connector, "monotonic", clock.monotonic)
    put(stack, time, "monotonic", clock.monotonic)
    put(stack, time, "perf_counter", clock.monotonic)
    put(stack, time, "time", clock.time)


def _swap(ours: dict[Any, Any], default: Any) -> Any:
    return ours.get(default, default) if callable(default) else default


def _our_modules() -> list[types.ModuleType]:
    return [module for name, module in sorted(sys.modules.items()) if name.startswith(_OURS)]


@functools.cache
def _our_functions() -> list[types.FunctionType]:
    found: dict[int, types.FunctionType] = {}
    for module in _our_modules():
        for value in list(vars(module).values()):
            owned = vars(value).values() if isinstance(value, type) else ()
            for function in (value, *owned):
                if isinstance(function, types.FunctionType):
                    found[id(function)] = function
    return list(found.values())


def _patch_chance(stack: contextlib.ExitStack, chance: random.Random) -> None:
    def token_hex(nbytes: int | None = None) -> str:
        return chance.randbytes(nbytes or 32).hex()

    def token_urlsafe(nbytes: int | None = None) -> str:
        return base64.urlsafe_b64encode(chance.randbytes(nbytes or 32)).rstrip(b"=").decode()

    put(stack, secrets, "token_hex", token_hex)
    put(stack, secrets, "token_bytes", lambda nbytes=None: chance.randbytes(nbytes or 32))
    put(stack, secrets, "token_urlsafe", token_urlsafe)
    put(stack, os, "urandom", chance.randbytes)
    state = random.getstate()
    stack.callback(random.setstate, state)
    random.seed(chance.random())


def _patch_disk(stack: contextlib.ExitStack, disk: Disk) -> None:
    write, pwrite, replace = os.write, os.pwrite, Path.replace

    def checked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            disk.check()
            return real(*args, **options)

        return call

    def write_some(descriptor: int, data: Any) -> int:
        if disk.full and disk.torn and len(data) > 1:
            disk.torn = False
            return write(descriptor, bytes(data)[: len(data) // 2])
        disk.check()
        return write(descriptor, data)

    put(stack, os, "write", write_some)
    put(stack, os, "pwrite", checked(pwrite))
    # Flushing costs time and is irrelevant here: no machine crashes.
    put(stack, os, "fsync", checked(lambda _descriptor: None))
    put(stack, Path, "replace", checked(replace))
