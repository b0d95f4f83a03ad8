"""The policy: what a person writes. `load_policy` reads one file and names every fault in it."""

from interpretops.policy.schema import (
    ALWAYS_GATE,
    Condition,
    DirectionAblation,
    FeatureClamp,
    FeatureScale,
    GateSpec,
    HeadScale,
    LoraGate,
    Policy,
    SteeringVector,
    load_policy,
    policy_from_document,
    policy_schema,
)
from interpretops.policy.terms import Constraints, Evaluation, Meta, Origin, SuccessCriteria, Suite

__all__ = [
    "ALWAYS_GATE",
    "Condition",
    "Constraints",
    "DirectionAblation",
    "Evaluation",
    "FeatureClamp",
    "FeatureScale",
    "GateSpec",
    "HeadScale",
    "LoraGate",
    "Meta",
    "Origin",
    "Policy",
    "SteeringVector",
    "SuccessCriteria",
    "Suite",
    "load_policy",
    "policy_from_document",
    "policy_schema",
]
