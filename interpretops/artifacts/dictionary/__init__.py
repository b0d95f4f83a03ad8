"""Dictionaries: SAE weights in any supported folder layout, read as encoder and decoder rows."""

from interpretops.artifacts.dictionary.load import Dictionary, open_dictionary
from interpretops.artifacts.dictionary.manifest import (
    DictionaryManifest,
    MetricsRecord,
    ModelReference,
    TrainingRecord,
    WeightsReference,
    read_manifest,
    write_manifest,
)
from interpretops.artifacts.dictionary.weights import EncoderRows

__all__ = [
    "Dictionary",
    "DictionaryManifest",
    "EncoderRows",
    "MetricsRecord",
    "ModelReference",
    "TrainingRecord",
    "WeightsReference",
    "open_dictionary",
    "read_manifest",
    "write_manifest",
]
