"""Baselines as policies: the same edit ungated, random directions of its norm, the DiffMean vector."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file, save

from discovery.errors import DiscoveryError
from interpretops.artifacts import ADAPTERS_FOLDER, Artifacts
from interpretops.artifacts.adapter import AdapterSite, write_adapter
from interpretops.artifacts.dictionary.manifest import WeightsReference, sha256_of, write_manifest
from interpretops.artifacts.vectors import FINGERPRINT_KEY
from interpretops.compile import compile_policy
from interpretops.errors import InterpretOpsError
from interpretops.files.atomic_file import write_atomically
from interpretops.plan import Array, ModelSpec, Plan, Site
from interpretops.policy import (
    ALWAYS_GATE,
    DirectionAblation,
    HeadScale,
    LoraGate,
    Policy,
    SteeringVector,
    load_policy,
)
from interpretops.riskcard.card import BaselineKind

SUFFIX: dict[BaselineKind, str] = {
    "ungated": ".ungated",
    "random_direction": ".random",
    "diffmean": ".diffmean",
}
_DECODERS = ("W_dec", "decoder.weight", "w_dec")


@dataclass
class Derived:
    """What was made: a folder of policies and one of artifacts that a gateway can serve."""

    policies: Path
    artifacts: Path
    ids: dict[BaselineKind, str] = field(default_factory=dict)
    """Policy id of each baseline."""
    notes: dict[BaselineKind, str] = field(default_factory=dict)
    """How each was made, or why it was not."""


def baseline_id(policy_id: str, kind: BaselineKind) -> str:
    """The id under which a baseline is served."""
    return policy_id[: 64 - len(SUFFIX[kind])] + SUFFIX[kind]


def derive_baselines(
    policy: Policy,
    model: ModelSpec,
    artifacts: Path,
    out: Path,
    *,
    seed: int,
    direction: Callable[[int], tuple[Array, str]] | str,
) -> Derived:
    """Write ``out/policies`` (the policy and its baselines) and ``out/artifacts`` (what they need).

    direction  gives the DiffMean vector [D] at a layer, and how it was made; or the reason why there is none
    """
    made = Derived(out / "policies", out / "artifacts")
    for folder in (made.policies, made.artifacts):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    found = Artifacts(artifacts, model)
    home = made.artifacts / model.name
    for folder in found.model_folders:
        if folder.is_dir():
            try:
                shutil.copytree(folder, home, copy_function=_link, dirs_exist_ok=True)
            except shutil.Error as error:  # it lists every file; the first says enough
                raise OSError(error.args[0][0][2]) from error
    plain = policy.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    plain.pop("evaluation", None)  # what serves a measurement must not wait for it
    _name_dictionaries(plain, found)
    _copy_vectors(policy, made.policies)
    draft = _Drafts(policy, model, made, plain, home, seed)
    draft.keep_policy()
    draft.ungated()
    draft.random()
    draft.diffmean(direction)
    for kind in list(made.ids):
        try:
            compile_policy(load_policy(draft.file(kind)), model=model, artifacts=made.artifacts)
        except InterpretOpsError as error:
            made.notes[kind] = f"it does not compile: {str(error).splitlines()[0].rsplit('/', 1)[-1]}"
            draft.file(kind).unlink()
            del made.ids[kind]
    return made


class _Drafts:
    """The policy as plain YAML, changed in one way for each baseline."""

    def __init__(
        self, policy: Policy, model: ModelSpec, made: Derived, plain: dict[str, Any], home: Path, seed: int
    ) -> None:
        self.policy, self.model, self.made, self.plain, self.home = policy, model, made, plain, home
        self.chance = np.random.default_rng(seed)
        self.seed = seed
        self.conditional = {name for name, gate in policy.gates.items() if gate.conditions}
        self.artifacts = Artifacts(made.artifacts, model)

    def file(self, kind: BaselineKind) -> Path:
        return self.made.policies / f"{baseline_id(self.policy.meta.id, kind)}.yaml"

    def keep_policy(self) -> None:
        """The policy itself: it compiles to the same revision."""
        path = self.made.policies / f"{self.policy.meta.id}.yaml"
        write_atomically(path, yaml.safe_dump(self.plain, sort_keys=False).encode())

    def _write(self, kind: BaselineKind, content: dict[str, Any], note: str) -> None:
        meta = {**content["meta"], "id": baseline_id(self.policy.meta.id, kind), "description": note[:4000]}
        used = {edit.get("gate", ALWAYS_GATE) for edit in content["interventions"]}
        gates = {name: gate for name, gate in content.get("gates", {}).items() if name in used}
        document = {**content, "meta": meta, "gates": gates}
        if not gates:
            del document["gates"]
        write_atomically(self.file(kind), yaml.safe_dump(document, sort_keys=False).encode())
        self.made.ids[kind], self.made.notes[kind] = meta["id"], note

    def ungated(self) -> None:
        """Every condition taken out; a gate that only names a phase stays."""
        gates = self.policy.gates
        if not any(gate.conditions for gate in gates.values()):
            self.made.notes["ungated"] = "the policy has no gate with a condition"
            return
        kept = {name: {"phase": gate.phase} for name, gate in gates.items() if gate.phase != "both"}
        edits = [
            edit if edit.get("gate", ALWAYS_GATE) in kept else {k: v for k, v in edit.items() if k != "gate"}
            for edit in self.plain["interventions"]
        ]
        content = {**self.plain, "gates": kept, "interventions": edits}
        self._write("ungated", content, "the policy's edits at every token, its gates' conditions taken out")

    def random(self) -> None:
        """Every written direction replaced by a random one of its norm; what is read stays."""
        edits: list[dict[str, Any]] = []
        for index, edit in enumerate(self.plain["interventions"]):
            edits.append(self._randomised(index, edit) if self._acts(edit) else edit)
        note = f"each written direction replaced by a random one of its norm, seed {self.seed}; gates kept"
        self._write("random_direction", {**self.plain, "interventions": edits}, note)

    def _acts(self, edit: dict[str, Any]) -> bool:
        """Whether an edit is what the policy does, not what its gate reads: the conditioned ones, if any."""
        return not self.conditional or edit.get("gate", ALWAYS_GATE) in self.conditional

    def _randomised(self, index: int, edit: dict[str, Any]) -> dict[str, Any]:
        policy_edit = self.policy.interventions[index]
        if isinstance(policy_edit, LoraGate):
            adapter = self.artifacts.adapter(policy_edit.adapter, self.policy.meta.target_class)
            sites = {
                site: AdapterSite(
                    rows.read, self._like(rows.write), rows.bias, rows.activation, rows.max_norm
                )
                for site, rows in adapter.sites.items()
            }
            name = f"{adapter.manifest.id[:50]}.random"
            write_adapter(
                self.home / ADAPTERS_FOLDER / name,
                sites,
                target_class=f"{adapter.manifest.target_class[:50]}.random",
                model=self.model,
            )
            return {**edit, "adapter": name}
        if isinstance(policy_edit, SteeringVector | DirectionAblation):
            layer = policy_edit.selector.all_layers[0]
            site = Site(layer, policy_edit.selector.point)
            name = f"{self.policy.meta.id}.random-{index}.safetensors"
            self._vector(name, self._like(self._vector_of(index, site)))
            return {**edit, "vector": {"file": name}}
        if isinstance(policy_edit, HeadScale):
            heads = self.chance.permutation(self.model.num_heads)[: len(policy_edit.selector.heads)]
            return {**edit, "selector": {**edit["selector"], "heads": sorted(map(int, heads))}}
        selector = policy_edit.selector
        site = Site(selector.layer, selector.point)
        name = self._random_dictionary(site, selector.dictionary, selector.sae_feature_ids)
        return {**edit, "selector": {**edit["selector"], "dictionary": name}}

    def _vector_of(self, index: int, site: Site) -> Array:
        """[D] the vector that an intervention writes, read from the compiled policy."""
        alone = {**self.plain, "interventions": [self.plain["interventions"][index]]}
        alone["gates"] = {
            name: gate
            for name, gate in alone.get("gates", {}).items()
            if name == alone["interventions"][0].get("gate")
        }
        path = self.made.policies / ".alone.yaml"
        path.write_text(yaml.safe_dump(alone, sort_keys=False))
        try:
            plan = compile_policy(load_policy(path), model=self.model, artifacts=self.made.artifacts)
        finally:
            path.unlink()
        vector: Array = plan.edits[site].units.write[0]
        return vector

    def _random_dictionary(self, site: Site, named: str | None, features: tuple[int, ...]) -> str:
        """A copy of a dictionary in which the features write random directions of their norm."""
        found = (
            self.artifacts.named_dictionary(named) if named is not None else self.artifacts.dictionary(site)
        )
        old = next(
            folder for folder, m in self.artifacts.all_dictionaries.items() if m.id == found.manifest.id
        )
        name = f"{found.manifest.id[:50]}.random"
        folder = old.with_name(name)
        if not folder.exists():
            shutil.copytree(old, folder, copy_function=_link)
        weights = folder / found.manifest.weights.file
        tensors = load_file(weights)
        key = next((key for key in _DECODERS if key in tensors), None)
        if key is None:
            raise DiscoveryError(f"{weights.name}: has none of {', '.join(_DECODERS)}, so no random baseline")
        rows = tensors[key].copy()
        if rows.shape[0] != found.manifest.width:  # [D, F]
            rows[:, list(features)] = self._like(rows[:, list(features)].T).T
        else:
            rows[list(features)] = self._like(rows[list(features)])
        weights.unlink()  # a link to the dictionary that it was copied from
        write_atomically(weights, save({**tensors, key: rows}))
        reference = WeightsReference(file=weights.name, sha256=sha256_of(weights))
        (folder / "manifest.yaml").unlink()
        write_manifest(folder, found.manifest.model_copy(update={"id": name, "weights": reference}))
        return name

    def _like(self, rows: Array) -> Array:
        """Random directions, each with the norm of its row."""
        drawn = self.chance.normal(size=rows.shape)
        norms = np.linalg.norm(rows, axis=-1, keepdims=True) / np.linalg.norm(drawn, axis=-1, keepdims=True)
        result: Array = (drawn * norms).astype(rows.dtype)
        return result

    def diffmean(self, direction: Callable[[int], tuple[Array, str]] | str) -> None:
        """One steering vector at the middle of the policy's layers, behind its first gate."""
        if isinstance(direction, str):
            self.made.notes["diffmean"] = direction
            return
        path = self.made.policies / f"{self.policy.meta.id}.yaml"
        plan: Plan = compile_policy(load_policy(path), model=self.model, artifacts=self.made.artifacts)
        acting = [
            site.layer
            for site, edits in plan.edits.items()
            if not self.conditional or any(len(plan.gates[int(gate)].cut) for gate in edits.units.gate)
        ]
        layers = sorted({*acting}) or sorted({site.layer for site in plan.edits})
        layer = layers[len(layers) // 2]
        vector, how = direction(layer)
        name = f"{self.policy.meta.id}.diffmean.safetensors"
        self._vector(name, vector)
        edit: dict[str, Any] = {
            "type": "steering_vector",
            "selector": {"layer": layer},
            "vector": {"file": name},
            "strength": 1.0,
        }
        kept = [given for given in self.plain["interventions"] if not self._acts(given)]
        gate = next((given.get("gate") for given in self.plain["interventions"] if self._acts(given)), None)
        content = {**self.plain, "interventions": [*kept, edit | ({"gate": gate} if gate else {})]}
        self._write("diffmean", content, f"{how}, strength 1 after layer {layer}, behind the policy's gate")

    def _vector(self, name: str, vector: Array) -> None:
        data = save({"vector": vector.astype(np.float32)}, {FINGERPRINT_KEY: self.model.fingerprint})
        write_atomically(self.made.policies / name, data)


def _name_dictionaries(plain: dict[str, Any], artifacts: Artifacts) -> None:
    """Name every dictionary: the random copy beside it would make 'the only one at this place' ambiguous."""

    def name(part: dict[str, Any], layer: int | None, point: str) -> None:
        if layer is not None and "dictionary" not in part:
            there = artifacts.dictionaries_at(Site(layer, point))  # type: ignore[arg-type]  # checked text
            if len(there) == 1:
                part["dictionary"] = next(iter(there.values())).id

    for gate in plain.get("gates", {}).values():
        for condition in gate.get("conditions", []):
            if "feature" in condition:
                name(condition, gate.get("layer"), gate.get("point", "resid_post"))
    for edit in plain["interventions"]:
        selector, vector = edit.get("selector", {}), edit.get("vector", {})
        point = selector.get("point", "resid_post")
        if "sae_feature_ids" in selector:
            name(selector, selector["layer"], point)
        elif "feature" in vector:
            name(vector, selector.get("layer"), point)


def _copy_vectors(policy: Policy, folder: Path) -> None:
    """The vector files that lie beside the policy; those of the artifacts come with them."""
    if policy.folder is None:
        return
    vectors = [getattr(edit, "vector", None) for edit in policy.interventions]
    vectors += [condition.probe for gate in policy.gates.values() for condition in gate.conditions]
    for vector in vectors:
        if vector is None or vector.file is None:
            continue
        path = policy.folder / vector.file
        if path.is_file():
            (folder / vector.file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / vector.file)


def _link(source: str, target: str) -> str:
    """A hard link where the disk allows it, else a copy."""
    try:
        Path(target).unlink(missing_ok=True)
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
