"""Raises the limit of open files and connections as far as the system allows, up to a maximum."""

import resource
from typing import Final

MAX_OPEN_FILES: Final = 65_536
"""As in the systemd unit: two for each of 32,000 requests in progress."""


def raise_limit() -> int:
    """Raise the soft limit of open files. Returns the new limit.

    A shell's limit is often 1,024. At 500 requests in progress, with two connections each, libuv accepts and
    at once closes further connections, clients see `ECONNRESET`, and the audit log cannot be reopened.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    return target
