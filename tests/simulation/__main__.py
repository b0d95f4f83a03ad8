"""Command line of the simulation: `python -m simulation`, with this folder's parent on the path."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys


def main() -> int:
    """Run the seeds that are asked for; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many seeds to run, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="one seed alone, with all that happened")
    parser.add_argument("--keep-going", action="store_true", help="do not end with the first failing seed")
    parser.add_argument("--seconds", type=float, help="begin no new seed after so long")
    parser.add_argument(
        "--only", help="let only this go wrong: names of `Operator.actions`, by commas, or none"
    )
    parser.add_argument("--put-back", help="with a fault that the gateway once had: a name of `PUT_BACK`")
    arguments = parser.parse_args()
    only = None if arguments.only is None else frozenset(arguments.only.split(",")) - {"none"}

    # Sets of texts are walked in another order in each process unless this is fixed before it starts.
    if os.environ.get("PYTHONHASHSEED") != "0":
        command = [sys.executable, "-m", "simulation", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})  # noqa: S606
    import time

    from simulation.run import run_seed

    logging.disable(logging.CRITICAL)
    began = time.monotonic()
    alone = arguments.seed is not None
    seeds = [arguments.seed] if alone else range(arguments.first, arguments.first + arguments.seeds)
    ran = steps = violations = 0
    first_failing: int | None = None
    trace = ""
    # What the imports made stays: no need to look at it after every seed.
    gc.freeze()
    for seed in seeds:
        if arguments.seconds is not None and time.monotonic() - began > arguments.seconds:
            break
        outcome = run_seed(seed, only=only, fault=arguments.put_back, keep_all=alone)
        gc.collect()
        ran, steps, trace = ran + 1, steps + outcome.steps, outcome.trace
        violations += len(outcome.violations)
        if alone:
            print("\n".join(outcome.lines))
        if outcome.violations:
            first_failing = seed if first_failing is None else first_failing
            print(f'seed {seed} fails; it replays with make simulate ARGS="--seed {seed}"')
            for violation in outcome.violations:
                print(f"  {violation}")
            sys.stdout.flush()
            if not arguments.keep_going:
                break
    told: dict[str, object] = {
        "seeds": ran,
        "steps": steps,
        "violations": violations,
        "first_failing_seed": first_failing,
    }
    if alone:
        told["trace"] = trace
    print(json.dumps(told))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
