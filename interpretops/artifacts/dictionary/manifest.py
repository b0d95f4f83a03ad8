"""The manifest of a dictionary or adapter: model, site, training, metrics, and the weights' sha256."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from interpretops.errors import AdapterError, DictionaryError, InterpretOpsError
from interpretops.files.atomic_file import write_atomically
from interpretops.files.regular_file import open_regular
from interpretops.files.schema_faults import describe_faults
from interpretops.files.strict_yaml import read_yaml
from interpretops.plan import Point, Site

MANIFEST_NAME = "manifest.yaml"

Layout = Literal["saelens", "gemma_scope", "sparsify", "dictionary_learning"]
Activation = Literal["relu", "jumprelu", "topk"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ArtifactId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]

M = TypeVar("M", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class ModelReference(_Record):
    """The model whose activations the weights were made from."""

    name: str
    """Its name, as of a model folder."""
    fingerprint: Sha256
    """Its fingerprint, see `interpretops.model.spec`."""


class WeightsReference(_Record):
    """The file that holds the weights."""

    file: FileName
    """Name of the file in the manifest's folder."""
    sha256: Sha256
    """sha256 of the whole file."""


class TrainingRecord(BaseModel):
    """How it was trained; keys beyond these are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    data: tuple[str, ...] = Field(default=(), strict=False)
    """Names of the data sets."""
    tokens: int | None = None
    """Tokens seen."""
    seed: int | None = None
    """Seed of the random numbers."""


class MetricsRecord(BaseModel):
    """What was measured on held-out text; keys beyond these are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    delta_ce: Finite | None = None
    """Rise of the cross-entropy when the reconstruction replaces the activation, in nats per token."""
    fvu: Finite | None = None
    """Fraction of the variance that the reconstruction leaves unexplained."""
    l0: Finite | None = None
    """Mean number of active features per token."""
    dead_share: Finite | None = None
    """Share of features that never fired."""


class DictionaryManifest(_Record):
    """What a dictionary is."""

    kind: Literal["dictionary"] = "dictionary"
    """Kind of artifact."""
    id: ArtifactId
    """Its name, that of its folder."""
    layout: Layout
    """Layout of the folder."""
    model: ModelReference
    """The model it belongs to."""
    layer: int = Field(ge=0)
    """Layer whose activation it reads."""
    point: Point
    """Point in the layer."""
    width: int = Field(ge=1)
    """Number of features."""
    hidden_size: int = Field(ge=1)
    """Width of the activation."""
    activation: Activation
    """Activation function of the features: `relu`, `jumprelu` or `topk` (a gated one reads as `jumprelu`)."""
    normalisation: Literal["none", "scale"] = "none"
    """`scale` when activations were multiplied by `scaling_factor`, which the weights do not contain yet."""
    scaling_factor: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The factor of `scale`."""
    max_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Tokens with a larger activation norm are attention sinks: never trained on, read or edited."""
    weights: WeightsReference
    """The weights file."""
    license: str | None = None
    """Licence of the weights."""
    training: TrainingRecord = TrainingRecord()
    """How it was trained."""
    metrics: MetricsRecord = MetricsRecord()
    """What was measured."""

    @property
    def site(self) -> Site:
        """The place whose activation it reads."""
        return Site(self.layer, self.point)


class AdapterManifest(_Record):
    """What an adapter is."""

    kind: Literal["adapter"] = "adapter"
    """Kind of artifact."""
    id: ArtifactId
    """Its name, that of its folder."""
    target_class: ArtifactId
    """The behaviour it was made against; a `lora_gate` without `adapter` finds it by this."""
    model: ModelReference
    """The model it belongs to."""
    weights: WeightsReference
    """The weights file."""
    license: str | None = None
    """Licence of the weights."""
    training: TrainingRecord = TrainingRecord()
    """How it was trained."""
    metrics: MetricsRecord = MetricsRecord()
    """What was measured."""


def read_manifest(folder: Path) -> DictionaryManifest:
    """Read the manifest in a dictionary's folder; raises `DictionaryError`."""
    return _read(folder, DictionaryManifest, DictionaryError)


def read_adapter_manifest(folder: Path) -> AdapterManifest:
    """Read the manifest in an adapter's folder; raises `AdapterError`."""
    return _read(folder, AdapterManifest, AdapterError)


def write_manifest(folder: Path, manifest: DictionaryManifest | AdapterManifest) -> Path:
    """Write ``folder/manifest.yaml`` atomically."""
    record = manifest.model_dump(mode="json", exclude_none=True)
    path = folder / MANIFEST_NAME
    write_atomically(path, yaml.safe_dump(record, sort_keys=False, width=110).encode())
    return path


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_weights(folder: Path, weights: WeightsReference, error: type[InterpretOpsError]) -> Path:
    """Return the path of the weights file after checking its sha256 against the manifest."""
    path = folder / weights.file
    try:
        found = sha256_of(path)
    except OSError as problem:
        raise error(
            f"{path}: cannot be read ({problem.strerror}); weights.file of the manifest names it"
        ) from problem
    if found != weights.sha256:
        raise error(
            f"{folder / MANIFEST_NAME}: weights.sha256 = {weights.sha256}, but {weights.file} has {found}; "
            "the file was changed or only partly copied"
        )
    return path


def _read(folder: Path, kind: type[M], error: type[InterpretOpsError]) -> M:
    document = read_yaml(folder / MANIFEST_NAME, error)
    try:
        return kind.model_validate(document.data)
    except ValidationError as problem:
        raise error("\n".join(describe_faults(problem, document, kind))) from problem
