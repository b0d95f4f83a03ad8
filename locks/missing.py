"""Adds a lock to an environment that others made: prints the pins of what it lacks, and checks what it has.

`missing.py LOCK` prints; `missing.py --check DISTRIBUTION` fails where an installed version is not one that
the distribution takes. Nothing but `packaging` is needed.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement


def missing(lock: str) -> str:
    """The entries of a lock, hashes included, whose packages are not installed in any version."""
    entries = re.split(r"\n(?=[A-Za-z0-9])", "\n" + lock)
    return "".join(f"{entry}\n" for entry in entries[1:] if _installed(re.split("[=;[ ]", entry)[0]) is None)


def unmet(distribution: str) -> list[str]:
    """What a distribution requires, extras aside, and is not installed in a version that it takes."""
    faults = []
    for text in importlib.metadata.requires(distribution) or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            faults.append(f"{distribution} needs {requirement}, but {found or 'none'} is installed")
    return faults


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: list[str]) -> int:
    """The two commands."""
    if arguments[:1] == ["--check"]:
        faults = unmet(arguments[1])
        sys.stderr.write("".join(f"{fault}\n" for fault in faults))
        return 1 if faults else 0
    sys.stdout.write(missing(Path(arguments[0]).read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
