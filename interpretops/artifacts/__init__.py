"""What policies name: dictionaries, adapters, vectors and probes, found, opened and checked."""

from interpretops.artifacts.index import ADAPTERS_FOLDER, Artifacts

__all__ = ["ADAPTERS_FOLDER", "Artifacts"]
