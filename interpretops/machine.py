"""Names this machine, for results that depend on it."""

import os
import platform
import shutil
import subprocess
from pathlib import Path


def machine_name() -> str:
    """Processor, cores and GPUs, as the operating system names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [f"{(names or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores"]
    if (tool := shutil.which("nvidia-smi")) is not None:
        asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, check=False, capture_output=True, text=True)  # noqa: S603  # fixed words
        # nvidia-smi may be installed on a machine without a GPU.
        parts += done.stdout.splitlines() if done.returncode == 0 else []
    return ", ".join(parts)
