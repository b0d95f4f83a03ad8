"""LCO of a Risk Card, read from the result of `make bench`."""

import json
import math
from pathlib import Path
from typing import Any

from discovery.data.sources import sha256_of_file
from interpretops.riskcard.card import Interval, Measure, Source
from interpretops.riskcard.intervals import NOTCH
from interpretops.riskcard.measures import absent

RESULT = Path("benchmarks/results/steering.json")


def find_result() -> Path | None:
    """The benchmark's result in the working directory, else in the checkout beside this package."""
    places = (Path.cwd() / RESULT, Path(__file__).resolve().parents[2] / RESULT)
    return next((place for place in places if place.is_file()), None)


def latency_measure(path: Path | None, model: str) -> tuple[Measure, str | None]:
    """Slow-down of a full batch with every request steered, and a note on where it was measured.

    The benchmark gives the median ratio of throughputs, steered over the engine without the plugin, with its
    quartiles over n rounds: LCO is 1 / ratio - 1.
    """
    if path is None:
        return absent(f"there is no {RESULT}; `make bench` writes it"), None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        measured_model, rounds = str(found["model"]).split(",")[0], int(found["rounds"])
        batches = [key for key in found if key.startswith("batch_")]
        batch = max(batches, key=lambda key: int(key.removeprefix("batch_")))
        steered = found[batch]["steered"]
        ratio, (lower, upper) = float(steered["over_vanilla"]), map(float, steered["quartiles"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return absent(f"{path.name} cannot be read ({type(error).__name__}: {error}); run `make bench`"), None
    if not 0 < lower <= ratio <= upper or rounds < 1:
        return absent(f"{path.name}: its quartiles do not hold the median; run `make bench`"), None
    if measured_model != model:
        return absent(f"{path.name} was measured with {measured_model}, not {model}; run `make bench`"), None
    margin = NOTCH * (upper - lower) / math.sqrt(rounds)
    low, high = 1 / (ratio + margin) - 1, 1 / max(ratio - margin, 1e-6) - 1
    source = Source(name=path.stem, sha256=sha256_of_file(path), n=rounds)
    note = (
        f"LCO is that of `make bench` ({batch.replace('_', ' of ')}, all steered, {rounds} rounds) on "
        f"{found.get('machine', 'an unnamed machine')} at commit {found.get('commit', 'unknown')}: of "
        "its own plan of ten features behind a gate, not of this policy."
    )
    interval = Interval(low=low, high=high, method="notch")
    return Measure(value=1 / ratio - 1, n=rounds, interval=interval, data=(source,)), note
