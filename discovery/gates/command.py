"""`mechctl fit-gate`: fits a gate and the edit behind it, and writes adapter and policy."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from discovery.data.sources import read_data_list
from discovery.frozen_model import open_frozen_model
from discovery.gates.fit_gate import GateFit
from discovery.gates.gate_artifact import policy_text, write_gate
from discovery.gates.gate_data import load_gate_data
from discovery.gates.gate_settings import EditSettings, GateSettings
from discovery.gates.gate_trade import trade
from interpretops.files.atomic_file import write_atomically
from interpretops.settings import Settings


def run_fit_gate(
    settings: Settings,
    *,
    data: Path,
    data_folder: Path | None,
    adapter: str,
    target_class: str,
    policy_id: str,
    out: Path | None,
    work: Path,
    gate: GateSettings,
    edit: EditSettings,
    say: Callable[[str], None],
    join: Sequence[Path] = (),
) -> None:
    """Fit a probe gate and the learned edit behind it; write the adapter's folder and the policy."""
    listed = read_data_list(data, data_folder)
    prompts = load_gate_data(listed, edit.seed)
    store = settings.cache.dir / "activations"
    fit = GateFit(open_frozen_model(settings, say), prompts, gate, edit, work, join, store)
    trained = fit.train()
    outcomes = fit.outcomes(trained, [*prompts.select, *prompts.test])
    write_atomically(work / "outcomes.json", json.dumps(outcomes).encode())
    threshold = fit.choose_threshold(outcomes)
    report = fit.report(outcomes, threshold)
    root = settings.paths.artifacts / fit.model.spec.name / "adapters"
    curve = trade(outcomes)
    write_gate(fit, trained, listed, root / adapter, target_class, threshold, report, curve)
    text = policy_text(fit, adapter, policy_id, target_class, threshold)
    path = work / f"{policy_id}.yaml" if out is None else out
    write_atomically(path, text.encode())
    for name, row in report.items():
        say(f"{name}: {json.dumps(row)}")
    for point in curve:
        say(f"trade, unseen: {json.dumps(point)}")
    say(f"{root / adapter}: adapter; {path}: policy")
