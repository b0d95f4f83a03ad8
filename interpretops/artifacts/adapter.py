"""Low-rank adapters in PEFT's folder layout, read and written with only numpy.

An adapter acts at edit sites: ``x' = x + alpha * scaling * B activation(A x + bias)``, A [r, D], B [D, r].
The configuration's key ``interpretops`` holds what PEFT has no fields for: for every site the
activation (`identity` or `relu`) and the norm bound. Tensors are named as PEFT would name a module called
after the point: ``base_model.model.model.layers.15.resid_post.lora_A.weight``, then ``lora_A.bias`` and
``lora_B.weight`` alike.

An adapter that PEFT trained on the attention's output projection (``o_proj``, or ``dense`` in GPT-NeoX)
loads unchanged and acts at ``attn_proj``; other target modules are refused by name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save as save_safetensors

from interpretops.artifacts.dictionary.manifest import (
    AdapterManifest,
    ModelReference,
    TrainingRecord,
    WeightsReference,
    check_weights,
    read_adapter_manifest,
    sha256_of,
    write_manifest,
)
from interpretops.artifacts.peft_config import check_lora_config
from interpretops.errors import AdapterError, PlanError
from interpretops.files.atomic_file import write_atomically
from interpretops.files.json_file import read_json_object
from interpretops.files.tensor_file import TensorFile
from interpretops.plan import Array, ModelSpec, Site

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

AdapterActivation = Literal["identity", "relu"]

PROJECTIONS = frozenset({"o_proj", "dense"})
"""Names of the attention's output projection, the only module whose LoRA is an edit."""

_PREFIX = "base_model.model.model.layers"
_PEFT_TENSOR = re.compile(
    r"base_model\.model\.(?:model|gpt_neox)\.layers\.(?P<layer>\d+)\.(?:self_attn\.o_proj|attention\.dense)"
    r"\.(?P<part>lora_A\.weight|lora_B\.weight)"
)
_TENSOR = re.compile(
    re.escape(_PREFIX) + r"\.(?P<site>\d+\.\w+)\.(?P<part>lora_A\.weight|lora_A\.bias|lora_B\.weight)"
)


@dataclass(frozen=True, eq=False)
class AdapterSite:
    """What an adapter does at one site."""

    read: Array
    """[r, D] rows of A"""
    write: Array
    """[r, D] columns of B, PEFT's scaling folded in"""
    bias: Array
    """[r]"""
    activation: AdapterActivation = "identity"
    max_norm: float | None = None
    """Tokens with a larger activation norm are not edited."""

    @property
    def threshold(self) -> float:
        """The activation as a threshold: a reading below it counts as 0."""
        return 0.0 if self.activation == "relu" else float("-inf")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank adapter, ready to become units of a plan."""

    manifest: AdapterManifest
    sites: Mapping[Site, AdapterSite]


def open_adapter(folder: Path) -> Adapter:
    """Open a folder with manifest.yaml, adapter_config.json and safetensors; raises `AdapterError`."""
    manifest = read_adapter_manifest(folder)
    path = check_weights(folder, manifest.weights, AdapterError)
    config = read_json_object(folder / CONFIG_NAME, AdapterError)
    tensors = TensorFile(path, AdapterError)
    check_lora_config(folder / CONFIG_NAME, config)
    scaling = _scaling(folder / CONFIG_NAME, config)
    if config.get("interpretops") is not None:
        described = _described_sites(folder / CONFIG_NAME, config)
        parts = _parts(tensors, described)
    else:
        parts = _peft_parts(folder / CONFIG_NAME, config, tensors)
        _check_rank(path, config["r"], parts)
        described = {site: _checked_options(path, str(site), {}) for site in parts}
    return Adapter(
        manifest,
        {
            site: _site(path, site, parts.get(site, {}), options, scaling)
            for site, options in sorted(described.items(), key=lambda item: item[0].order)
        },
    )


def write_adapter(
    folder: Path,
    sites: Mapping[Site, AdapterSite],
    *,
    target_class: str,
    model: ModelSpec,
    training: TrainingRecord | None = None,
    license_name: str | None = None,
) -> AdapterManifest:
    """Write a folder that `open_adapter` reads: weights, configuration, then the manifest."""
    rank = max(len(site.read) for site in sites.values())
    tensors, described = {}, {}
    for site, edit in sites.items():
        stem = f"{_PREFIX}.{site}"
        tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(edit.read, np.float32)
        tensors[f"{stem}.lora_A.bias"] = np.ascontiguousarray(edit.bias, np.float32)
        tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(edit.write.T, np.float32)
        described[str(site)] = {"activation": edit.activation, "max_norm": edit.max_norm}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "target_modules": sorted({site.point for site in sites}),
        "inference_mode": True,
        "interpretops": {"sites": described},
    }
    write_atomically(folder / WEIGHTS_NAME, save_safetensors(tensors))
    write_atomically(folder / CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    manifest = AdapterManifest(
        id=folder.name,
        target_class=target_class,
        model=ModelReference(name=model.name, fingerprint=model.fingerprint),
        weights=WeightsReference(file=WEIGHTS_NAME, sha256=sha256_of(folder / WEIGHTS_NAME)),
        license=license_name,
        training=training or TrainingRecord(),
    )
    write_manifest(folder, manifest)
    return manifest


def _peft_parts(path: Path, config: dict[str, Any], tensors: TensorFile) -> dict[Site, dict[str, Any]]:
    """The parts of an adapter that PEFT wrote, by edit site."""
    targets = config.get("target_modules")
    named = {targets} if isinstance(targets, str) else set(targets or ())
    if not named or not named <= PROJECTIONS:
        raise AdapterError(
            f"{path}: target_modules = {targets!r}, but only the attention's output projection "
            f"({' or '.join(sorted(PROJECTIONS))}) is an edit site; train the adapter on only that"
        )
    parts: dict[Site, dict[str, Any]] = {}
    for name in tensors:
        match = _PEFT_TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(f"{tensors.path}: tensor {name!r} belongs to no attention output projection")
        site = Site(int(match["layer"]), "attn_proj")
        parts.setdefault(site, {})[match["part"]] = np.array(tensors[name], np.float64)
    return parts


def _check_rank(path: Path, rank: int, parts: Mapping[Site, dict[str, Any]]) -> None:
    """PEFT takes the scale from the configuration's rank, so the tensors must have that rank."""
    for site, tensors in parts.items():
        found = tensors["lora_A.weight"].shape[0] if "lora_A.weight" in tensors else rank
        if found != rank:
            raise AdapterError(f"{path}: site {site} has rank {found}, but {CONFIG_NAME} says r = {rank}")


def _described_sites(path: Path, config: dict[str, Any]) -> dict[Site, dict[str, Any]]:
    ours = config.get("interpretops")
    sites = ours.get("sites") if isinstance(ours, dict) else None
    if not isinstance(sites, dict) or not sites:
        raise AdapterError(
            f"{path}: interpretops.sites = {sites!r}, but must name the edit sites and their options"
        )
    described = {}
    for text, options in sites.items():
        try:
            site = Site.parse(text)
        except PlanError as error:
            raise AdapterError(f"{path}: interpretops.sites: {error}") from error
        described[site] = _checked_options(path, text, options)
    return described


def _checked_options(path: Path, text: str, options: Any) -> dict[str, Any]:
    where = f"{path}: interpretops.sites[{text!r}]"
    if not isinstance(options, dict) or not set(options) <= {"activation", "max_norm"}:
        raise AdapterError(f"{where} must be an object with activation and max_norm only")
    if options.get("activation", "identity") not in ("identity", "relu"):
        raise AdapterError(f"{where}.activation = {options['activation']!r}, but must be identity or relu")
    bound = options.get("max_norm")
    number = isinstance(bound, int | float) and not isinstance(bound, bool)
    if bound is not None and not (number and 0 < bound < float("inf")):
        raise AdapterError(f"{where}.max_norm = {bound!r}, but must be a positive number or null")
    return {"activation": options.get("activation", "identity"), "max_norm": bound}


def _scaling(path: Path, config: dict[str, Any]) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"{path}: r = {rank!r}, but must be a positive integer")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < float("inf"):
        raise AdapterError(f"{path}: lora_alpha = {alpha!r}, but must be a number")
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _parts(tensors: TensorFile, described: Mapping[Site, Any]) -> dict[Site, dict[str, Any]]:
    parts: dict[Site, dict[str, Any]] = {}
    for name in tensors:
        match = _TENSOR.fullmatch(name)
        owners = [] if match is None else [site for site in described if str(site) == match["site"]]
        if match is None or not owners:
            raise AdapterError(f"{tensors.path}: tensor {name!r} belongs to none of the described edit sites")
        parts.setdefault(owners[0], {})[match["part"]] = np.array(tensors[name], np.float64)
    return parts


def _site(
    path: Path, site: Site, parts: dict[str, Any], options: dict[str, Any], scaling: float
) -> AdapterSite:
    missing = {"lora_A.weight", "lora_B.weight"} - set(parts)
    if missing:
        raise AdapterError(f"{path}: has no {', '.join(sorted(missing))} for site {site}")
    read, write = parts["lora_A.weight"], parts["lora_B.weight"].T * scaling
    bias = parts.get("lora_A.bias", np.zeros(read.shape[:1]))
    same = read.shape == write.shape or (site.point == "attn_proj" and read.shape[:1] == write.shape[:1])
    fits = read.ndim == write.ndim == 2 and same and bias.shape == read.shape[:1]
    if not fits or not all(np.isfinite(array).all() for array in (read, write, bias)):
        raise AdapterError(
            f"{path}: site {site} has A {read.shape}, B {write.T.shape}, bias {bias.shape}, but needs "
            "A [r, D], B [D, r], bias [r] of finite numbers"
        )
    return AdapterSite(*(array.astype(np.float32) for array in (read, write, bias)), **options)
