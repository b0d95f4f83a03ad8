"""Circuits: which components of a model carry a behaviour; the file format and the folder of saved ones."""

from interpretops.circuit.circuit_file import (
    FORMATS,
    Ablation,
    Circuit,
    CircuitDictionary,
    CircuitEdge,
    CircuitError,
    CircuitNode,
    ComponentKind,
    DataFile,
    Faithfulness,
    Method,
    RandomCircuits,
    Stability,
    load_circuit,
)

__all__ = [
    "FORMATS",
    "Ablation",
    "Circuit",
    "CircuitDictionary",
    "CircuitEdge",
    "CircuitError",
    "CircuitNode",
    "ComponentKind",
    "DataFile",
    "Faithfulness",
    "Method",
    "RandomCircuits",
    "Stability",
    "load_circuit",
]
