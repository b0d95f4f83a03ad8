"""Writes a proposal: vectors and adapter rows, the policy with its header, the run record."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save as save_safetensors
from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.gates.contrast import Contrast
from discovery.jobs.run_record import commit
from discovery.jobs.whole_file import write_whole
from discovery.proposals.settings import ProposeSettings
from interpretops.artifacts.adapter import AdapterSite, write_adapter
from interpretops.artifacts.dictionary.manifest import TrainingRecord
from interpretops.artifacts.vectors import FINGERPRINT_KEY
from interpretops.compile import compile_policy
from interpretops.errors import PolicyError
from interpretops.files.strict_yaml import parse_yaml
from interpretops.plan import ModelSpec, Site
from interpretops.policy import policy_from_document

VECTORS = "vectors"


@dataclass(frozen=True)
class ProposalPaths:
    """Where a proposal's files are written."""

    policy_id: str
    policy: Path
    record: Path
    artifacts: Path
    """Root of dictionaries, adapters and vectors."""


def vector_file(policy_id: str) -> str:
    """The vector file of a policy, relative to the model's folder in the artifacts."""
    return f"{VECTORS}/{policy_id}.safetensors"


def write_vectors(path: Path, vectors: dict[str, Tensor], spec: ModelSpec) -> None:
    """Write vectors with the model's fingerprint, so that no other model can use them."""
    data = save_safetensors(
        {name: vector.float().contiguous() for name, vector in vectors.items()},
        {FINGERPRINT_KEY: spec.fingerprint},
    )
    write_whole(path, data)


def write_rows(
    paths: ProposalPaths,
    sites: Mapping[Site, AdapterSite],
    contrast: Contrast,
    spec: ModelSpec,
    made: TrainingRecord,
    record: dict[str, Any],
) -> None:
    """Write rows as an adapter named after the policy; adds data, seed and commit to ``made``."""
    folder = paths.artifacts / spec.name / "adapters" / paths.policy_id
    data = sorted({f"{entry['path']} ({entry.get('licence', 'own')})" for entry in contrast.record})
    training = made.model_copy(update={"data": tuple(data), "seed": record["seed"], "commit": commit()})
    try:
        write_adapter(
            folder,
            sites,
            target_class=contrast.name,
            model=spec,
            training=training,
            license_name="Apache-2.0",
        )
    except OSError as error:
        raise DiscoveryError(
            f"{folder}: cannot be written ({error.strerror or error}); finished steps are kept: "
            "free space or name another folder, and run the same command again"
        ) from error
    write_record(folder / "run.json", record)


def policy_yaml(document: dict[str, Any], header: list[str], chosen: ProposeSettings) -> str:
    """The policy file: ``header`` as a comment, then the document with any suites and success criteria."""
    bars = {
        "defense_efficacy_min": chosen.defense_efficacy_min,
        "collateral_damage_max": chosen.collateral_damage_max,
    }
    evaluation = {
        "suites": [{"name": name} for name in chosen.suites],
        "success_criteria": {name: bar for name, bar in bars.items() if bar is not None},
    }
    if given := {key: value for key, value in evaluation.items() if value}:
        document = document | {"evaluation": given}
    comment = "".join(f"# {line}\n" for line in header)
    return comment + yaml.safe_dump(document, sort_keys=False, width=110)


def write_policy(text: str, record: dict[str, Any], paths: ProposalPaths, spec: ModelSpec) -> str:
    """Check that the policy compiles, and write it with its record; returns the revision."""
    document = parse_yaml(text.encode(), PolicyError, str(paths.policy))
    plan = compile_policy(
        policy_from_document(document, paths.policy.parent), model=spec, artifacts=paths.artifacts
    )
    write_record(paths.record, record | {"policy": paths.policy_id, "revision": plan.revision})
    write_whole(paths.policy, text.encode())
    return plan.revision


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a run record whole or not at all."""
    write_whole(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def no_point(policy_id: str, record: Path, best: str) -> DiscoveryError:
    """The error if no point of the grid keeps the budgets; the record with all points is already written."""
    return DiscoveryError(
        f"{policy_id}: no point of the grid has an effect within the budgets; {best}; "
        f"all points are in {record}: widen budgets, strengths or contrast"
    )
