"""The plan: a policy compiled to the numbers the engine applies, immutable and named by its sha256.

`sites` says where edits act, `edits` what they do, `gates` when. `plan` holds all of it, `file` reads it
back, and `check` refuses an invalid plan. `digest` hashes only the numbers. `compose` and `shard` derive
plans from plans. `reach` says whether a prompt is edited in the same way as an answer.
"""

from interpretops.plan.digest import content_digest
from interpretops.plan.edits import (
    INT_FIELDS,
    UNIT_FIELDS,
    Array,
    HeadScaling,
    IntArray,
    SiteEdits,
    TopK,
    Units,
    empty_units,
)
from interpretops.plan.file import read_plan
from interpretops.plan.gates import (
    ALWAYS,
    MAX_ANSWER_WINDOW,
    MAX_GATES,
    MAX_WINDOW,
    PROBE_FIELDS,
    Combine,
    Gate,
    Phase,
    ProbePart,
    Scope,
)
from interpretops.plan.plan import Plan
from interpretops.plan.sites import HEAD_POINTS, POINTS, ModelSpec, Point, Site

__all__ = [
    "ALWAYS",
    "HEAD_POINTS",
    "INT_FIELDS",
    "MAX_ANSWER_WINDOW",
    "MAX_GATES",
    "MAX_WINDOW",
    "POINTS",
    "PROBE_FIELDS",
    "UNIT_FIELDS",
    "Array",
    "Combine",
    "Gate",
    "HeadScaling",
    "IntArray",
    "ModelSpec",
    "Phase",
    "Plan",
    "Point",
    "ProbePart",
    "Scope",
    "Site",
    "SiteEdits",
    "TopK",
    "Units",
    "content_digest",
    "empty_units",
    "read_plan",
]
