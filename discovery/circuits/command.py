"""What the command `search` does: from settings and a file of pairs to a circuit file and a few lines."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from discovery.circuits.pairs import (
    CLASS_ANSWERS,
    LAYOUTS,
    Reading,
    encode_pairs,
    names_answers,
    read_pairs,
    split_pairs,
)
from discovery.circuits.search import CircuitSearch, SearchSettings
from discovery.errors import DiscoveryError
from discovery.run_record import run_record
from discovery.sources import sha256_of_file
from interpretops.circuit import Circuit, DataFile
from interpretops.settings import Settings

Say = Callable[[str], None]


def search(
    settings: Settings,
    *,
    pairs: Path,
    target_class: str,
    out: Path,
    work: Path,
    reading: Reading,
    chosen: SearchSettings,
    held_out: float,
    limit: int | None,
    say: Say,
) -> None:
    """Search the circuit of a contrast and write it to ``out``; a run that was stopped goes on."""
    chosen.check()
    if reading.layout not in LAYOUTS:
        raise DiscoveryError(f"layout = {reading.layout!r}, but must be one of {', '.join(LAYOUTS)}")
    reading = _with_class_answers(reading, target_class, pairs)
    read_pairs(pairs, reading)  # a fault of the file shows before a model is loaded
    model = _model(settings, say)
    texts = read_pairs(pairs, reading, whole_years=len(model.text_ids("52")) == 1)
    encoded, skipped = encode_pairs(model, texts, reading)
    discovery, evaluation = split_pairs(encoded, held_out, limit)
    data = DataFile(
        name=pairs.name,
        sha256=sha256_of_file(pairs),
        discovery_pairs=len(discovery),
        evaluation_pairs=len(evaluation),
        skipped_pairs=skipped,
    )
    options = asdict(chosen) | {"reading": asdict(reading), "held_out": held_out, "limit": limit}
    record = run_record("search", chosen.seed, options, data.model_dump())
    run = CircuitSearch(model, discovery, evaluation, chosen, work)
    say(f"{pairs}: {len(discovery)} pairs to search, {len(evaluation)} to measure, {skipped} skipped")
    circuit = run.run(target_class, data, record)
    try:
        circuit.save(out)
    except OSError as error:
        raise DiscoveryError(
            f"{out}: cannot be written ({error.strerror or error}); "
            f"the finished steps are in {run.steps.folder}"
        ) from error
    for line in summary(circuit):
        say(line)
    say(f"{out}: circuit")


def summary(circuit: Circuit) -> list[str]:
    """A circuit's measures in a few lines."""
    lines = [
        f"{len(circuit.nodes)} of {circuit.method.nodes_of_model} nodes, "
        f"{len(circuit.edges)} of {circuit.method.edges_of_model} edges"
    ]
    for found in circuit.faithfulness:
        line = (
            f"{found.ablation} ablation: faithfulness {found.faithfulness:.3f}, CPR {found.cpr:.3f}, "
            f"CMD {found.cmd:.3f}"
        )
        if (random := found.random) is not None:
            line += (
                f" ({random.count} random circuits: {random.faithfulness_mean:.3f}, {random.cpr_mean:.3f}, "
                f"{random.cmd_mean:.3f})"
            )
        lines.append(line)
    stable = circuit.stability
    lines.append(
        f"stability over {stable.circuits} circuits: edges {stable.edge_jaccard:.3f} "
        f"(chance {stable.edge_chance:.3f}), nodes {stable.node_jaccard:.3f} "
        f"(chance {stable.node_chance:.3f})"
    )
    strongest = sorted(
        (node for node in circuit.nodes if node.ccs is not None), key=lambda node: -abs(node.ccs or 0.0)
    )
    lines.append("strongest: " + ", ".join(f"{node.id} {node.ccs:.2f}" for node in strongest[:8]))
    return lines


def _with_class_answers(reading: Reading, target_class: str, pairs: Path) -> Reading:
    """For a class with known answers those, when neither the file nor the command names any."""
    given = reading.answers or reading.wrong or reading.layout != "pairs"
    if given or target_class not in CLASS_ANSWERS or names_answers(pairs):
        return reading
    answers, wrong = CLASS_ANSWERS[target_class]
    return replace(reading, answers=answers, wrong=wrong)


def _model(settings: Settings, say: Say) -> Any:
    """The model in float32 unless the settings name a dtype: in bfloat16, small effects drown in rounding."""
    import torch

    from discovery.frozen_model import FrozenModel
    from interpretops.model_source import resolve_model

    folder = resolve_model(settings.model.name, settings.cache.dir, say, revision=settings.model.revision)
    device = settings.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if settings.model.dtype == "auto" else getattr(torch, settings.model.dtype)
    return FrozenModel(folder, dtype, device)
