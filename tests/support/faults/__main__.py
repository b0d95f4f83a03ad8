"""Command line of the fault run: `python -m faults`, with this folder's parent on the path."""

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from faults.breakages import breakages
from faults.run import Outcome, check_audit, run_faults
from faults.stand import make_stand
from interpretops.model.default_model import ensure_default_model
from interpretops.settings import load_settings


async def run(wanted: str) -> Outcome:
    """Run every fault whose name contains ``wanted``, on a gateway with its own engine."""
    model = ensure_default_model(load_settings().cache.dir, print)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        async with make_stand(Path(folder), model) as stand:
            faults = [fault for fault in breakages(malformed=1000, disconnects=200) if wanted in fault.name]
            outcome = await run_faults(stand, faults, lambda line: print(line, flush=True))
        outcome.wrong += check_audit(stand)
    return outcome


def main() -> int:
    """Print each fault as it runs, then the problems, then the summary."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", default="", help="run only faults whose name contains this")
    outcome = asyncio.run(run(arguments.parse_args().only))
    for line in outcome.wrong:
        print(f"WRONG: {line}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    place = {"machine": platform.processor() or platform.machine(), "commit": commit.stdout.strip()}
    print(json.dumps(outcome.summary() | place))
    return 1 if outcome.wrong or outcome.leaks else 0


if __name__ == "__main__":
    sys.exit(main())
