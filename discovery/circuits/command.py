"""`mechctl search`: turns pairs or prompts into a circuit file and a short summary."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from discovery.circuits.matching import match_prompts
from discovery.circuits.pairs import (
    CLASS_ANSWERS,
    encode_pairs,
    names_answers,
    read_pairs,
    split_pairs,
)
from discovery.circuits.search import CircuitSearch
from discovery.circuits.search_settings import PairFormat, PairSelection, SearchSettings
from discovery.data.sources import Source, read_prompts, sha256_of_file
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel, open_frozen_model
from discovery.jobs.run_record import run_record
from discovery.jobs.stopping import interruptible
from interpretops.artifacts import Artifacts
from interpretops.artifacts.dictionary import Dictionary, open_dictionary
from interpretops.artifacts.dictionary.manifest import MANIFEST_NAME
from interpretops.circuit import Circuit, CircuitNode, DataFile
from interpretops.circuit.store import CircuitStore
from interpretops.errors import DictionaryError
from interpretops.settings import Settings

Say = Callable[[str], None]


def run_search(
    settings: Settings,
    *,
    pairs: Path | None,
    prompts: Path | None = None,
    target_class: str,
    out: Path,
    work: Path,
    pair_format: PairFormat,
    selection: PairSelection,
    chosen: SearchSettings,
    dictionaries: Sequence[str],
    say: Say,
) -> None:
    """Search the circuit of a contrast and write it to ``out``; resumes a stopped run.

    pairs    file of contrast pairs, or
    prompts  file of prompts that show the behaviour; each is paired with a harmless prompt that we ship
    out      a ``.json`` file, or a folder for a file named by the circuit's id
    dictionaries  ids, or folders of dictionaries
    """
    if not target_class.strip():
        raise DiscoveryError("--class is empty; name the behaviour that the pairs contrast")
    if (pairs is None) == (prompts is None):
        raise DiscoveryError("search needs --pairs or --prompts, and not both")
    source = pairs or prompts
    assert source is not None
    pair_format = replace(
        pair_format, chat=prompts is not None if pair_format.chat is None else pair_format.chat
    )
    if pairs is not None:
        pair_format = _with_class_answers(pair_format, target_class, pairs)
        read_pairs(pairs, pair_format)  # report faults in the file before loading a model
    else:
        read_prompts(Source(source, "prompts"))
    # In bfloat16, rounding hides small effects, so the serving dtype does not count.
    model = open_frozen_model(settings, say, torch.float32)
    opened = _dictionaries(settings, model, dictionaries)
    unmatched = 0
    if pairs is not None:
        texts = read_pairs(pairs, pair_format, whole_years=len(model.text_ids("52")) == 1)
    else:
        texts, unmatched = match_prompts(
            model,
            source,
            target_class,
            chat=bool(pair_format.chat),
            most=selection.limit,
            answers=pair_format.answers,
            wrong=pair_format.wrong,
        )
    encoded, skipped = encode_pairs(model, texts, pair_format)
    skipped += unmatched
    discovery, evaluation = split_pairs(encoded, selection.held_out, selection.limit)
    data = DataFile(
        name=source.name,
        sha256=sha256_of_file(source),
        discovery_pairs=len(discovery),
        evaluation_pairs=len(evaluation),
        skipped_pairs=skipped,
    )
    options = asdict(chosen) | {"reading": asdict(pair_format)} | asdict(selection)
    options |= {"dictionaries": list(dictionaries)}
    record = run_record("search", chosen.seed, options, data.model_dump())
    run = CircuitSearch(model, discovery, evaluation, chosen, work, opened)
    say(f"{source}: {len(discovery)} pairs to search, {len(evaluation)} to measure, {skipped} skipped")
    with interruptible(f"finished steps are in {run.steps.folder}"):
        circuit = run.run(target_class, data, record)
    file = out if out.suffix == ".json" and not out.is_dir() else out / f"{circuit.id}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        circuit.save(file)
    except OSError as error:
        raise DiscoveryError(
            f"{file}: cannot be written ({error.strerror or error}); "
            f"the finished steps are in {run.steps.folder}"
        ) from error
    CircuitStore(settings.circuits_dir).add(circuit)
    for line in summary(circuit):
        say(line)
    say(f"{file}: circuit {circuit.id}")


def summary(circuit: Circuit) -> list[str]:
    """A circuit's measures in a few lines of text."""
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
    """The dictionaries named on the command line, each by its id or its folder."""
    artifacts = Artifacts(settings.paths.artifacts, model.spec)
    found = []
    for name in dict.fromkeys(names):
        try:
            if (Path(name) / MANIFEST_NAME).is_file():
                found.append(_in_folder(Path(name), model))
                continue
            found.append(artifacts.named_dictionary(name))
        except DictionaryError as error:
            raise DiscoveryError(f"--dictionary {name}: {error}") from error
    return found


def _in_folder(folder: Path, model: FrozenModel) -> Dictionary:
    dictionary = open_dictionary(folder)
    of = dictionary.manifest.model
    if of.fingerprint != model.spec.fingerprint:
        raise DictionaryError(
            f"{folder}: is a dictionary of {of.name} (fingerprint {of.fingerprint[:12]}), and the model is "
            f"{model.spec.name} (fingerprint {model.spec.fingerprint[:12]}); train one with mechctl sae-train"
        )
    return dictionary


def _with_class_answers(pair_format: PairFormat, target_class: str, pairs: Path) -> PairFormat:
    """Use the class's known answers if neither the file nor the command names any."""
    given = pair_format.answers or pair_format.wrong or pair_format.layout != "pairs"
    if given or target_class not in CLASS_ANSWERS or names_answers(pairs):
        return pair_format
    answers, wrong = CLASS_ANSWERS[target_class]
    return replace(pair_format, answers=answers, wrong=wrong)
