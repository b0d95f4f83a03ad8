"""What the command `search` does: from settings and a file of pairs to a circuit file and a few lines."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

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
from discovery.data.sources import sha256_of_file
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.jobs.run_record import run_record
from discovery.jobs.stopping import interruptible
from interpretops.artifacts import Artifacts
from interpretops.artifacts.dictionary import Dictionary
from interpretops.circuit import Circuit, CircuitNode, DataFile
from interpretops.errors import DictionaryError
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
    dictionaries: Sequence[str],
    say: Say,
) -> None:
    """Search the circuit of a contrast and write it to ``out``; a run that was stopped goes on."""
    chosen.check()
    if not target_class.strip():
        raise DiscoveryError("--class is empty; name the behaviour that the pairs contrast")
    if not 0 < held_out < 1:
        raise DiscoveryError(f"held-out = {held_out}, but must be a share between 0 and 1")
    if limit is not None and limit < 2:
        raise DiscoveryError(f"limit = {limit}, but must be at least 2: one pair to search, one to measure")
    if reading.layout not in LAYOUTS:
        raise DiscoveryError(f"layout = {reading.layout!r}, but must be one of {', '.join(LAYOUTS)}")
    reading = _with_class_answers(reading, target_class, pairs)
    read_pairs(pairs, reading)  # a fault of the file shows before a model is loaded
    model = _model(settings, say)
    opened = _dictionaries(settings, model, dictionaries)
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
    options |= {"dictionaries": list(dictionaries)}
    record = run_record("search", chosen.seed, options, data.model_dump())
    run = CircuitSearch(model, discovery, evaluation, chosen, work, opened)
    say(f"{pairs}: {len(discovery)} pairs to search, {len(evaluation)} to measure, {skipped} skipped")
    with interruptible(f"finished steps are in {run.steps.folder}"):
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
    components = sum(node.dictionary is None for node in circuit.nodes)
    lines = [
        f"{components} of {circuit.method.nodes_of_model} nodes, "
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
    lines.append("strongest: " + _named(circuit.components()))
    for held in circuit.dictionaries:
        whole = held.score_features + held.score_error
        lines.append(
            f"{held.id}: {held.active} of {held.width} features differ, which carry "
            f"{held.ccs_all:.3f} of the contrast (by attribution {held.score_features / whole:.3f}); "
            f"{len(circuit.features(held.id))} named ones {held.ccs_named:.3f} "
            f"({held.random_sets} random sets: {held.ccs_random_mean:.3f}); stability {held.jaccard:.3f} "
            f"(chance {held.chance:.3f})"
        )
        lines.append("strongest: " + _named(circuit.features(held.id)))
    return lines


def _named(nodes: Sequence[CircuitNode]) -> str:
    return ", ".join(f"{node.id} {node.ccs:.2f}" for node in nodes[:8])


def _dictionaries(settings: Settings, model: FrozenModel, names: Sequence[str]) -> list[Dictionary]:
    """The dictionaries of the model that the command names."""
    artifacts = Artifacts(settings.paths.artifacts, model.spec)
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(artifacts.named_dictionary(name))
        except DictionaryError as error:
            raise DiscoveryError(f"--dictionary {name}: {error}") from error
    return found


def _with_class_answers(reading: Reading, target_class: str, pairs: Path) -> Reading:
    """For a class with known answers those, when neither the file nor the command names any."""
    given = reading.answers or reading.wrong or reading.layout != "pairs"
    if given or target_class not in CLASS_ANSWERS or names_answers(pairs):
        return reading
    answers, wrong = CLASS_ANSWERS[target_class]
    return replace(reading, answers=answers, wrong=wrong)


def _model(settings: Settings, say: Say) -> FrozenModel:
    """The model in float32, whatever dtype it is served in: in bfloat16, small effects drown in rounding."""
    import torch

    from interpretops.model.source import resolve_model

    folder = resolve_model(settings.model.name, settings.cache.dir, say, revision=settings.model.revision)
    device = settings.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return FrozenModel(folder, torch.float32, device)
