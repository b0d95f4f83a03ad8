"""Compiles a policy into a plan for one model and its artifacts, or reports every fault and its location."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from interpretops.artifacts import Artifacts
from interpretops.compile.fault_list import FaultList
from interpretops.compile.site_draft import SiteDraft
from interpretops.compile.sources import Sources
from interpretops.errors import PlanError, PolicyError
from interpretops.files.strict_yaml import KeyPath
from interpretops.plan import (
    ALWAYS,
    HEAD_POINTS,
    Array,
    Gate,
    ModelSpec,
    Plan,
    ProbePart,
    Site,
    TopK,
    read_plan,
)
from interpretops.policy import (
    ALWAYS_GATE,
    DirectionAblation,
    FeatureClamp,
    FeatureScale,
    GateSpec,
    HeadScale,
    LoraGate,
    Policy,
    SteeringVector,
)


def compile_policy(policy: Policy, *, model: ModelSpec, artifacts: Path) -> Plan:
    """Compile a policy for a model.

    The same policy, model and artifacts give the same bytes. ``artifacts`` is the folder that holds
    ``<model>/<dictionary>/``; the policy's own vector files are next to the policy. Raises `PolicyError`
    with one line per fault.
    """
    return _Compiler(policy, model, Path(artifacts)).run()


class _Compiler:
    def __init__(self, policy: Policy, model: ModelSpec, artifacts: Path) -> None:
        self.policy = policy
        self.model = model
        self.faults = FaultList(policy.document)
        self.sources = Sources(policy, model, Artifacts(artifacts, model), self.faults)
        self.drafts: dict[Site, SiteDraft] = {}
        self.gate_index = {name: index for index, name in enumerate((ALWAYS_GATE, *policy.gates))}
        self.edited: dict[tuple[Any, ...], KeyPath] = {}

    def run(self) -> Plan:
        gates = [ALWAYS, *(self._gate(("gates", name), gate) for name, gate in self.policy.gates.items())]
        builders: dict[str, Callable[[KeyPath, Any, int], None]] = {
            "feature_scale": self._features,
            "feature_clamp": self._features,
            "steering_vector": self._direction,
            "direction_ablation": self._direction,
            "head_scale": self._head_scale,
            "lora_gate": self._lora_gate,
        }
        for index, intervention in enumerate(self.policy.interventions):
            builders[intervention.type](
                ("interventions", index), intervention, self.gate_index[intervention.gate]
            )
        self.faults.raise_if_any()
        plan = Plan(
            self.policy.meta.id,
            self.policy.meta.target_class,
            self.model,
            {site: draft.close() for site, draft in self.drafts.items()},
            tuple(gates),
            self.sources.provenance,
        )
        return self._proven(plan)

    def _proven(self, plan: Plan) -> Plan:
        """The plan as an engine will read it. If the plan format rejects it, the policy is at fault."""
        try:
            return read_plan(plan.to_bytes())
        except PlanError as error:
            raise PolicyError(f"{self.policy.document.source}: cannot be compiled: {error}") from error

    def _draft(self, site: Site, path: KeyPath, gate: int) -> SiteDraft:
        name = next(name for name, index in self.gate_index.items() if index == gate)
        reads = self.policy.gates.get(name)
        if reads is not None and reads.layer is not None:
            place = Site(reads.layer, reads.point)
            if place.order > site.order:
                self.faults.add(
                    (*path, "gate"),
                    f"= {name!r}, but it reads at {place}, after the edit at {site} has acted",
                )
        return self.drafts.setdefault(site, SiteDraft(self.model.width(site.point)))

    def _gate(self, path: KeyPath, gate: GateSpec) -> Gate:
        if gate.layer is None or not self.sources.layer_fits((*path, "layer"), gate.layer):
            return Gate(None, ALWAYS.read, ALWAYS.bias, ALWAYS.cut, phase=gate.phase)
        site = Site(gate.layer, gate.point)
        if gate.scope in ("prompt", "answer"):
            return self._probe_gate(path, gate, site)
        bounds = [self.sources.norm_bound(site)]
        rows, biases, cuts = [], [], []
        for index, condition in enumerate(gate.conditions):
            place = (*path, "conditions", index)
            if condition.probe is not None:
                vector = self.sources.vector((*place, "probe"), condition.probe, site)
                rows.append(vector)
                biases.append(condition.bias)
                cuts.append(condition.threshold)
                continue
            assert condition.feature is not None
            found = self.sources.features(
                place, site, condition.dictionary, {(*place, "feature"): condition.feature}
            )
            if found is None:
                continue
            if found.activation == "topk":
                self.faults.add(
                    (*place, "feature"),
                    f"= {condition.feature}, but {found.manifest.id} is a TopK dictionary, whose features "
                    "only a whole encoder can read; use a probe or another dictionary",
                )
            encoder = found.encoder_rows([condition.feature])
            rows.append(encoder.read[0])
            biases.append(float(encoder.bias[0]))
            cuts.append(max(condition.threshold, float(encoder.threshold[0])))
            bounds.append(found.max_norm)
        read = np.array(rows, np.float32).reshape(len(rows), self.model.width(site.point))
        return Gate(
            site,
            read,
            np.array(biases, np.float32),
            np.array(cuts, np.float32),
            combine=gate.combine,
            scope=gate.scope,
            latched=gate.latched,
            phase=gate.phase,
            max_norm=min(bounds) if gate.max_norm is None else gate.max_norm,
            refusal=gate.refusal_sentence,
        )

    def _probe_gate(self, path: KeyPath, gate: GateSpec, site: Site) -> Gate:
        (condition,) = gate.conditions
        assert condition.attention_probe is not None
        where = (*path, "conditions", 0, "attention_probe")
        found = self.sources.attention_probe(where, condition.attention_probe, site)
        if found is None:
            return ALWAYS
        if max(found.layers) != site.layer:
            self.faults.add(
                (*path, "layer"),
                f"= {site.layer}, but the attention probe decides at layer {max(found.layers)}",
            )
        parts = [
            ProbePart(
                Site(layer, gate.point), own["query"], own["read"], own["bias"], float(own["max_norm"][0])
            )
            for layer, own in found.layers.items()
        ]
        return Gate(
            site,
            ALWAYS.read,
            ALWAYS.bias,
            np.array([condition.threshold - condition.bias], np.float32),
            scope=gate.scope,
            latched=gate.latched,
            phase=gate.phase,
            probe=tuple(parts),
            refusal=gate.refusal_sentence,
            window=gate.window,
            beside=None if gate.beside is None else self.gate_index[gate.beside],
            prompt_weight=float(np.float32(gate.prompt_weight or 0.0)),
        )

    def _features(self, path: KeyPath, edit: FeatureScale | FeatureClamp, gate: int) -> None:
        selector, place = edit.selector, (*path, "selector")
        if not self.sources.layer_fits((*place, "layer"), selector.layer):
            return
        site, ids = Site(selector.layer, selector.point), selector.sae_feature_ids
        named = {(*place, "sae_feature_ids", i): feature for i, feature in enumerate(ids)}
        dictionary = self.sources.features(place, site, selector.dictionary, named)
        draft = self._draft(site, path, gate)
        if dictionary is None:
            return
        name = dictionary.manifest.id
        for where, feature in named.items():
            self._once(where, (site, name, feature, gate), f"= {feature}")
        if dictionary.activation == "topk":
            if draft.topk_owner not in (None, name):
                self.faults.add(
                    place,
                    f"uses {name}, but {draft.topk_owner} is used at {site}; use one TopK dictionary a site",
                )
            elif draft.topk is None:
                assert dictionary.k is not None
                whole = dictionary.encoder_rows()
                draft.topk, draft.topk_owner = TopK(whole.read, whole.bias, dictionary.k), name
        encoder = dictionary.encoder_rows(ids)
        values: dict[str, Any] = {"gain": edit.scale - 1} if isinstance(edit, FeatureScale) else {}
        if isinstance(edit, FeatureClamp):
            values["low"], values["high"] = edit.clamp_range
        draft.add_units(
            read=encoder.read,
            write=dictionary.decoder_rows(ids),
            bias=encoder.bias,
            threshold=encoder.threshold,
            max_norm=dictionary.max_norm,
            topk=np.array(ids) if dictionary.activation == "topk" else -1,
            gate=gate,
            **values,
        )

    def _direction(self, path: KeyPath, edit: SteeringVector | DirectionAblation, gate: int) -> None:
        selector = edit.selector
        many = len(selector.all_layers) > 1
        if many and edit.vector.feature is not None and edit.vector.dictionary is None:
            self.faults.add(
                (*path, "vector"), "names a feature for several layers, so it must name a dictionary"
            )
            return
        for part, layer in zip(selector.named_layers, selector.all_layers, strict=True):
            if not self.sources.layer_fits((*path, "selector", *part), layer):
                continue
            site = Site(layer, selector.point)
            vector = self.sources.vector((*path, "vector"), edit.vector, site)
            draft = self._draft(site, path, gate)
            bound = self.sources.norm_bound(site) if edit.max_norm is None else edit.max_norm
            if isinstance(edit, SteeringVector):
                draft.add_units(
                    read=np.zeros((1, draft.width), np.float32),
                    write=vector[None],
                    offset=edit.strength,
                    max_norm=bound,
                    gate=gate,
                )
            else:
                unit = _normalised(vector)[None]
                draft.add_units(read=unit, write=unit, gain=-edit.strength, max_norm=bound, gate=gate)

    def _head_scale(self, path: KeyPath, edit: HeadScale, gate: int) -> None:
        place = (*path, "selector")
        fits = self.sources.heads_fit((*place, "heads"), edit.selector.heads)
        for part, layer in zip(edit.selector.named_layers, edit.selector.all_layers, strict=True):
            if not self.sources.layer_fits((*place, *part), layer) or not fits:
                continue
            site = Site(layer, "attn_z")
            for index, head in enumerate(edit.selector.heads):
                self._once((*place, "heads", index), (site, "head", head, gate), f"= {head}")
            mask = self._head_mask(edit.selector.heads)
            self._draft(site, path, gate).add_head_scale(mask * np.float32(edit.scale - 1), gate)

    def _lora_gate(self, path: KeyPath, edit: LoraGate, gate: int) -> None:
        selector, place = edit.selector, (*path, "selector")
        fits = self.sources.heads_fit((*place, "heads"), selector.heads or ())
        for index, layer in enumerate(selector.layers or ()):
            fits &= self.sources.layer_fits((*place, "layers", index), layer)
        adapter = self.sources.adapter(path, edit.adapter)
        if adapter is None or not fits:
            return
        chosen = {
            site: part
            for site, part in adapter.sites.items()
            if site.point in selector.points and (selector.layers is None or site.layer in selector.layers)
        }
        if not chosen:
            there = ", ".join(map(str, adapter.sites))
            self.faults.add(place, f"selects no part of adapter {adapter.manifest.id}, which acts at {there}")
        for site, part in chosen.items():
            if not self.sources.adapter_fits(place, adapter, site, part.read.shape[1]):
                continue
            read = part.read
            if selector.heads is not None:
                if site.point not in HEAD_POINTS:
                    self.faults.add(
                        (*place, "heads"),
                        f"is given, but the adapter reads at {site}, where there are no heads",
                    )
                    continue
                read = read * self._head_mask(selector.heads)
            self._draft(site, path, gate).add_units(
                read=read,
                write=part.write,
                bias=part.bias,
                threshold=part.threshold,
                gain=edit.alpha,
                max_norm=self.sources.norm_bound(site) if part.max_norm is None else part.max_norm,
                gate=gate,
            )

    def _head_mask(self, heads: tuple[int, ...]) -> Array:
        mask = np.zeros((self.model.num_heads, self.model.head_dim), np.float32)
        mask[list(heads)] = 1
        return mask.reshape(-1)

    def _once(self, path: KeyPath, key: tuple[Any, ...], value: str) -> None:
        """Refuse two edits of the same target under one gate: they would add up, which is never intended."""
        first = self.edited.setdefault(key, path)
        if first != path:
            self.faults.add(
                path, f"{value}, but {self.faults.show(first)} already edits the same target; merge the two"
            )


def _normalised(vector: Array) -> Array:
    wide = vector.astype(np.float64)
    return (wide / np.linalg.norm(wide)).astype(np.float32)
