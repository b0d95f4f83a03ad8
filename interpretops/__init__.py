"""The library and SDK: edits a language model's activations per request, as a YAML policy says."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interpretops.steering.hooked_model import HookedModel
    from interpretops.steering.session import SteeringSession

__all__ = ["HookedModel", "SteeringSession", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the SDK names on first use, so that importing the library needs no torch."""
    if name == "HookedModel":
        from interpretops.steering.hooked_model import HookedModel

        return HookedModel
    if name == "SteeringSession":
        from interpretops.steering.session import SteeringSession

        return SteeringSession
    raise AttributeError(f"module 'interpretops' has no attribute {name!r}")
