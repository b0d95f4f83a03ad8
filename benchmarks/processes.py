"""Resources of a process and its children as the system reports them: memory, file descriptors, threads."""

import psutil


def children(pid: int) -> list[int]:
    """All descendants of a process, without itself."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def holds(pids: list[int]) -> dict[str, float]:
    """Sums of memory in MB, file descriptors and threads. Processes that just ended count as 0."""
    total = {"memory_mb": 0.0, "fds": 0.0, "threads": 0.0}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            memory, fds, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
        except psutil.Error:
            continue
        total["memory_mb"] += memory / 2**20
        total["fds"] += fds
        total["threads"] += threads
    return total


def argument(pid: int, flag: str) -> str | None:
    """The value of a flag on a process's command line."""
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return None
    return words[words.index(flag) + 1] if flag in words[:-1] else None
