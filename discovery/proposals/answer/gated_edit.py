"""Proposes a learned gated edit: hands the contrast to `fit-gate` as a data list.

`fit-gate` teaches the project's own refusals, so this suits classes whose target prompts should be refused.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from discovery.errors import DiscoveryError
from discovery.gates.command import run_fit_gate
from discovery.gates.contrast import PARTS, SIDES, Contrast
from discovery.gates.gate_settings import EditSettings, GateSettings
from discovery.jobs.run_record import run_record
from discovery.jobs.whole_file import write_whole
from discovery.proposals.artifact import ProposalPaths, policy_yaml, write_policy
from discovery.proposals.settings import ProposeSettings
from interpretops.files.strict_yaml import read_yaml
from interpretops.model.source import resolve_model
from interpretops.model.spec import read_model_spec
from interpretops.settings import Settings

GROUPS = {"target": "harmful", "benign": "benign", "borderline": "benign_borderline"}
"""`fit-gate`'s names for the sides."""
CUTS = 40
"""Most thresholds in the record's curve."""


def propose_gated_edit(
    settings: Settings,
    chosen: ProposeSettings,
    contrast: Contrast,
    paths: ProposalPaths,
    work: Path,
    say: Callable[[str], None],
) -> None:
    """Train and select with `fit-gate`, then write policy and record like every proposal."""
    if contrast.judge.kind != "refusal":
        raise DiscoveryError(
            f"{chosen.contrast}: judge.kind = {contrast.judge.kind!r}, but a gated-edit teaches refusals; "
            "use 'refusal', or --method direction"
        )
    if contrast.wanted:
        say("a gated-edit teaches the project's own refusals: the class file's 'wanted' is not used")
    spec = read_model_spec(resolve_model(settings.model.name, settings.cache.dir, say))
    middle = round(spec.num_layers * 0.53)
    layers = chosen.layers or tuple(
        sorted({middle, round(spec.num_layers * 0.63), round(spec.num_layers * 0.73)})
    )
    read_at = max(min(layers) - 1, 0) if chosen.gate_layer is None else chosen.gate_layer
    draft = work / f"{paths.policy_id}.draft.yaml"
    run_fit_gate(
        settings,
        data=_data_list(contrast, work / "data"),
        data_folder=None,
        adapter=paths.policy_id,
        target_class=contrast.name,
        policy_id=paths.policy_id,
        out=draft,
        work=work / "fit-gate",
        gate=GateSettings(
            layers=tuple(sorted({read_at * 3 // 5, read_at * 4 // 5, read_at})),
            benign_budget=chosen.budgets.benign,
            borderline_budget=chosen.budgets.borderline,
            seed=chosen.seed,
        ),
        edit=EditSettings(layers=layers, rank=chosen.rank, steps=chosen.steps, seed=chosen.seed),
        say=say,
    )
    curve = _curve(json.loads((work / "fit-gate" / "outcomes.json").read_text(encoding="utf-8")))
    record = run_record("propose", chosen.seed, chosen.record(), contrast.record) | {
        "model": {"name": spec.name, "fingerprint": spec.fingerprint},
        "class": contrast.name,
        "prompts": {part: {side: len(contrast[part, side]) for side in SIDES} for part in PARTS},
        "adapter": paths.policy_id,
        "curve": curve,
    }
    header = [
        f"Made by `mechctl propose --from {chosen.start} --method gated-edit` from {chosen.contrast.name}, "
        f"seed {chosen.seed}.",
        "Rates on the selection prompts are in the manifest of its adapter; "
        f"data, versions and all thresholds: records/{paths.record.name}.",
    ]
    document = dict(read_yaml(draft, DiscoveryError).data)
    text = policy_yaml(document, header, chosen)
    revision = write_policy(text, record, paths, spec)
    say(f"{paths.policy}: policy, revision {revision[:12]}; {paths.record}: record")


def _data_list(contrast: Contrast, folder: Path) -> Path:
    """Files of prompts for `fit-gate`, one per part and side, and the list that names them."""
    listed: dict[str, list[dict[str, Any]]] = {}
    for part in PARTS:
        for side in SIDES:
            prompts = contrast[part, side]
            if not prompts:
                continue
            name = GROUPS[side] if part == "discovery" else f"select_{GROUPS[side].removeprefix('benign_')}"
            write_whole(folder / f"{name}.json", json.dumps(prompts, indent=0).encode())
            listed[name] = [
                {"path": f"{name}.json", "name": f"{contrast.name}-{name}", "licence": "as its contrast"}
            ]
    path = folder / "data.yaml"
    write_whole(path, yaml.safe_dump(listed, sort_keys=False).encode())
    return path


def _curve(outcomes: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Refused share of each selection group at the thresholds between its readings."""
    groups = {name: rows for name, rows in outcomes.items() if name.startswith("select_")}
    readings = sorted(
        {round(row["reading"], 4) for rows in groups.values() for row in rows if row["refused"]}
    )
    step = max(1, len(readings) // CUTS)
    return [
        {
            "threshold": cut,
            "refused": {
                name: round(sum(row["refused"] and row["reading"] >= cut for row in rows) / len(rows), 4)
                for name, rows in groups.items()
            },
        }
        for cut in readings[::step]
    ]
