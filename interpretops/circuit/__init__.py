"""Circuits: which components of a model carry a behaviour, as a file, and the folder that keeps them."""

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
