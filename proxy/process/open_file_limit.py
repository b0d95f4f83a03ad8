"""How many files and connections the process may hold: as many as the system lets it, up to a bound."""

import resource
from typing import Final

MOST: Final = 65_536
"""As in the systemd unit: two for each of 32,000 requests in flight."""


def raise_limit() -> int:
    """Raise the soft limit of open files, and give what it is then.

    A shell's is often 1,024: at 500 requests in flight, two connections each, uv accepts further ones only to
    close them, clients see `ECONNRESET`, and the audit log cannot be opened again either.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(MOST, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
