"""Work folders: each records the run that it belongs to, and refuses any other run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from discovery.errors import DiscoveryError
from discovery.jobs.whole_file import write_json
from interpretops.files.json_file import read_json_object

RUN = "run.json"
_LONGEST = 60


def claim_folder(folder: Path, identity: Mapping[str, Any], remedy: str, *, empty: bool = True) -> None:
    """Start or resume a run in ``folder``. Raises `DiscoveryError` if the folder belongs to another run.

    identity  JSON values by name: what distinguishes this run from others
    remedy    what the user can do instead, as the end of a sentence
    empty     refuse a folder that holds files but no record
    """
    path = folder / RUN
    if not path.exists():
        if empty and folder.is_dir() and any(folder.iterdir()):
            raise DiscoveryError(f"{folder}: holds other files; {remedy}")
        write_json(path, dict(identity))
        return
    changed = difference(read_json_object(path, DiscoveryError), identity)
    if changed is not None:
        raise DiscoveryError(f"{path}: belongs to another run ({changed}); {remedy}")


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """How a saved record differs from what would be written now, by name; None if it does not."""
    now = json.loads(json.dumps(dict(here)))
    names = sorted(name for name in {*there, *now} if there.get(name) != now.get(name))
    told = [f"{name}: {_short(there.get(name))} there, {_short(now.get(name))} here" for name in names]
    return ", ".join(told) or None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
