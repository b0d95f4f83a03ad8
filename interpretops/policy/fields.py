"""The parts that policies are made of: checked numbers and names, vectors and selectors."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

from interpretops.plan.sites import Point


def _unique(values: tuple[int, ...]) -> tuple[int, ...]:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"names {twice[0]} twice")
    return values


def _relative(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "\\" in path or ":" in parts[0] or "\0" in path:
        raise ValueError("must be a relative path without '..'")
    return path


Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Percentage = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e6)]
Fraction = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
Index = Annotated[int, Field(ge=0)]
Indices = Annotated[
    tuple[Index, ...], Field(min_length=1, max_length=4096), Strict(False), AfterValidator(_unique)
]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
RelativePath = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_relative)]
NormBound = Annotated[float, Field(allow_inf_nan=False, gt=0)]

POINTS_OF_BLOCK: dict[str, tuple[Point, ...]] = {
    "attn": ("attn_z", "attn_proj", "attn_out"),
    "mlp": ("mlp_out",),
    "resid": ("resid_post",),
}
EditPoint = Literal["attn_z", "attn_out", "mlp_out", "resid_post"]
"""Points that a policy may name; adapters of a projection also act at `attn_proj`."""


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown keys, converts no types and is immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Vector(StrictModel):
    """A direction in activation space: a tensor of a safetensors file, or one feature's decoder row."""

    file: RelativePath | None = None
    """A safetensors file, beside the policy or in the model's folder of the artifacts."""
    tensor: str | None = None
    """Name of the tensor in the file; may be left out when the file holds a single one."""
    feature: Index | None = None
    """Take this feature's decoder row instead of a file."""
    dictionary: Identifier | None = None
    """Dictionary of `feature`; may be left out when the model has a single one at the place."""

    @model_validator(mode="after")
    def _one_source(self) -> "Vector":
        if (self.file is None) == (self.feature is None):
            raise ValueError("needs either 'file' or 'feature'")
        if self.file is None and self.tensor is not None:
            raise ValueError("has a 'tensor' but no 'file' to take it from")
        if self.feature is None and self.dictionary is not None:
            raise ValueError("has a 'dictionary' but no 'feature' of it")
        return self


class FeatureSelector(StrictModel):
    """Features of one dictionary at one place of the model."""

    layer: Index
    """Layer, counted from 0."""
    point: EditPoint = "resid_post"
    """Point in the layer: `attn_z`, `attn_out`, `mlp_out` or `resid_post`."""
    sae_feature_ids: Indices
    """Ids of the features."""
    dictionary: Identifier | None = None
    """Id of the dictionary; may be left out when the model has a single one at this layer and point."""


class _Layers(StrictModel):
    layer: Index | None = None
    """One layer, counted from 0."""
    layers: Indices | None = None
    """Several layers, instead of `layer`."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.layer is None) == (self.layers is None):
            raise ValueError("needs either 'layer' or 'layers'")
        return self

    @property
    def named_layers(self) -> tuple[tuple[str | int, ...], ...]:
        """Each named layer with its place under the selector: ``("layers", 1)`` for error messages."""
        return (("layer",),) if self.layers is None else tuple(("layers", i) for i in range(len(self.layers)))

    @property
    def all_layers(self) -> tuple[int, ...]:
        """The named layers."""
        if self.layers is not None:
            return self.layers
        assert self.layer is not None
        return (self.layer,)


class PlaceSelector(_Layers):
    """One or several layers, and the point in them."""

    point: EditPoint = "resid_post"
    """Point in the layer: `attn_z`, `attn_out`, `mlp_out` or `resid_post`."""


class HeadSelector(_Layers):
    """Attention heads of one or several layers."""

    heads: Indices
    """Attention heads, counted from 0."""


class AdapterSelector(StrictModel):
    """The part of an adapter that acts."""

    block: Literal["attn", "mlp", "resid"]
    """Kind of module: `attn` (attn_z, attn_out), `mlp` (mlp_out) or `resid` (resid_post)."""
    heads: Indices | None = None
    """Read these attention heads only; for adapters that read at `attn_z`."""
    layers: Indices | None = None
    """Act in these layers only; else in all layers of the adapter."""

    @property
    def points(self) -> tuple[Point, ...]:
        """The points of a layer that the block stands for."""
        return POINTS_OF_BLOCK[self.block]
