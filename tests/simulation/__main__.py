"""Command line of the simulation: `python -m simulation`, with this folder's parent on the path."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys


def main() -> int:
    """Run the requested seeds; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many seeds to run, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="one seed alone, with all that happened")
    parser.add_argument("--keep-going", action="store_true", help="do not end with the first failing seed")
    parser.add_argument("--seconds", type=float, help="begin no new seed after so long")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes to run seeds in at once")
    parser.add_argument(
        "--only", help="let only this go wrong: names of `Operator.actions`, by commas, or none"
    )
    parser.add_argument("--put-back", help="with a fault that the gateway once had: a name of `PUT_BACK`")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"argument --jobs: {arguments.jobs}, but at least one process must run the seeds")
    only = None if arguments.only is None else frozenset(arguments.only.split(",")) - {"none"}

    # Sets of strings iterate in a different order in each process unless the hash seed is fixed at start-up.
    if os.environ.get("PYTHONHASHSEED") != "0":
        command = [sys.executable, "-m", "simulation", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})  # noqa: S606
    import time

    from simulation.jobs import Order, outcomes

    until = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    alone = arguments.seed is not None
    seeds = [arguments.seed] if alone else range(arguments.first, arguments.first + arguments.seeds)
    order = Order(only, arguments.put_back, until, keep_lines=alone)
    ran = steps = violations = 0
    first_failing: int | None = None
    trace = ""
    processes: set[int] = set()
    with contextlib.closing(outcomes(seeds, order, arguments.jobs)) as all_outcomes:
        for process, outcome in all_outcomes:
            ran, steps, trace = ran + 1, steps + outcome.steps, outcome.trace
            violations += len(outcome.violations)
            processes.add(process)
            if alone:
                print("\n".join(outcome.lines))
            if outcome.violations:
                seed = outcome.seed
                first_failing = seed if first_failing is None else first_failing
                print(f'seed {seed} fails; it replays with make simulate ARGS="--seed {seed}"')
                for violation in outcome.violations:
                    print(f"  {violation}")
                sys.stdout.flush()
                if not arguments.keep_going:
                    break
    reported: dict[str, object] = {
        "seeds": ran,
        "steps": steps,
        "violations": violations,
        "first_failing_seed": first_failing,
        "processes": len(processes),
    }
    if alone:
        reported["trace"] = trace
    print(json.dumps(reported))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
