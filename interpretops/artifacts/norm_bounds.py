"""A model's recorded norm bounds: at each site, tokens with a larger norm are attention sinks.

The file is ``<artifacts>/<model>/norm-bounds.yaml``. An edit along a direction takes its bound from the
policy, from the dictionaries that the policy names, or from this file; never from other files there.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from interpretops.artifacts.dictionary.manifest import ModelReference
from interpretops.errors import DictionaryError, PlanError
from interpretops.files.schema_faults import describe_faults
from interpretops.files.strict_yaml import read_yaml
from interpretops.plan import Site

BOUNDS_NAME = "norm-bounds.yaml"

Bound = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NormBounds(BaseModel):
    """The recorded bounds of a model's activation norms."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    kind: Literal["norm_bounds"] = "norm_bounds"
    """Kind of artifact."""
    model: ModelReference
    """The model it belongs to."""
    bounds: dict[str, Bound]
    """By site, such as `15.resid_post`: tokens with a larger norm are attention sinks."""

    @field_validator("bounds")
    @classmethod
    def _are_sites(cls, bounds: dict[str, float]) -> dict[str, float]:
        for text in bounds:
            try:
                Site.parse(text)
            except PlanError as error:
                raise ValueError(str(error)) from error
        return bounds


def read_norm_bounds(path: Path) -> NormBounds:
    """Read the bounds from a file; raises `DictionaryError`."""
    document = read_yaml(path, DictionaryError)
    try:
        return NormBounds.model_validate(document.data)
    except ValidationError as problem:
        raise DictionaryError("\n".join(describe_faults(problem, document, NormBounds))) from problem
