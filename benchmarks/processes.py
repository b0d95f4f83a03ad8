"""What a process and its children hold, as the system sees it: memory, file descriptors, threads."""

import os
from pathlib import Path

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


def children(pid: int) -> list[int]:
    """All processes that descend from one, itself not among them."""
    parent_of: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent_of[int(folder.name)] = int(_stat(int(folder.name))[1])
            except OSError:
                continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parent_of.items() if parent == one]
    return found[1:]


def holds(pids: list[int]) -> dict[str, float]:
    """Sums of memory in MB, file descriptors and threads. A process that just ended counts nothing."""
    total = {"memory_mb": 0.0, "fds": 0.0, "threads": 0.0}
    for pid in pids:
        try:
            memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MB
            fds, threads = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()), int(_stat(pid)[17])
        except OSError:
            continue
        total["memory_mb"] += memory
        total["fds"] += fds
        total["threads"] += threads
    return total


def argument(pid: int, flag: str) -> str | None:
    """What follows a flag on a process's command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return None
    return words[words.index(flag) + 1] if flag in words[:-1] else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on: parent is 1, threads are 17."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
