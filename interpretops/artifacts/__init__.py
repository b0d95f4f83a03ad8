"""Finds, opens and checks the artifacts that policies name: dictionaries, adapters, vectors and probes."""

from interpretops.artifacts.index import ADAPTERS_FOLDER, Artifacts

__all__ = ["ADAPTERS_FOLDER", "Artifacts"]
