"""The settings of the offline jobs: what is refused, in which words, and that a run keeps its identity."""

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from discovery.circuits.search_settings import PairFormat, PairSelection, SearchSettings
from discovery.data.trace_settings import TraceSettings
from discovery.evaluation.options import JobOptions
from discovery.gates.gate_settings import EditSettings, GateSettings
from discovery.jobs.job_settings import faults
from discovery.proposals.answer.proposal import _that_decide
from discovery.proposals.settings import Budgets, ProposeSettings
from discovery.sae.sae_train import train_digest
from discovery.sae.train_settings import TrainSettings

ALL: tuple[Any, ...] = (
    TraceSettings,
    TrainSettings,
    GateSettings,
    EditSettings,
    Budgets,
    ProposeSettings,
    PairFormat,
    PairSelection,
    SearchSettings,
)
Propose = partial(ProposeSettings, contrast=Path("classes/own.yaml"))
TRACED: Any = SimpleNamespace(record={"shards": [{"sha256": "0" * 64}]})


@pytest.mark.parametrize(
    ("settings", "change", "line"),
    [
        (TraceSettings, {"layers": (1, 1)}, "layers = (1, 1), but must be different layers, each named once"),
        (TraceSettings, {"context": 2}, "context = 2, but must be at least 8"),
        (TraceSettings, {"held_out_share": 1.0}, "held_out_share = 1.0, but must be less than 1"),
        (TraceSettings, {"held_out_share": float("nan")}, "held_out_share = nan, but must be less than 1"),
        (TraceSettings, {"sink_ratio": 1}, "sink_ratio = 1, but must be more than 1"),
        (TraceSettings, {"dtype": "int8"}, "dtype = 'int8', but must be one of float16, bfloat16"),
        (
            TraceSettings,
            {"context": 64, "written_tokens": 64},
            "written_tokens = 64, but must be less than context, which is 64",
        ),
        (TrainSettings, {"width": 64, "k": 64}, "k = 64.0, but must be less than width, which is 64"),
        (TrainSettings, {"tokens": 100}, "tokens = 100, but must be at least batch, which is 1024"),
        (
            TrainSettings,
            {"batch": 64, "workers": 3},
            "batch = 64, but must be a multiple of workers, which is 3, and at least twice as many",
        ),
        (TrainSettings, {"layer": "ten"}, "layer = 'ten', but must be a whole number"),
        (
            GateSettings,
            {"layers": (1, 2), "heads": 65},
            "heads = 65, but must be fewer: heads x probes x layers is 65 x 1 x 2 = 130, and an engine "
            "keeps 128",
        ),
        (
            GateSettings,
            {"layers": (2, 1)},
            "layers = (2, 1), but must be at least one layer, the lowest first",
        ),
        (GateSettings, {"unseen_numbers": 1.0}, "unseen_numbers = 1.0, but must be less than 1"),
        (
            GateSettings,
            {"weights": (("benign", 0.0),)},
            "weights = (('benign', 0.0),), but must be different groups, each with a number above 0",
        ),
        (
            GateSettings,
            {"weights": (("benign", 1.0), ("benign", 2.0))},
            "weights = (('benign', 1.0), ('benign', 2.0)), but must be different groups, each with a number "
            "above 0",
        ),
        (EditSettings, {"layers": ()}, "layers = (), but must be at least one layer"),
        (PairSelection, {"held_out": 1.0}, "held_out = 1.0, but must be less than 1"),
        (SearchSettings, {"seeds": 4}, "seeds = 4, but must be at least 5"),
        (JobOptions, {"limit": 0}, "limit = 0, but must be at least 1"),
        (JobOptions, {"latency_rounds": -1}, "latency_rounds = -1, but must be at least 0"),
        (Propose, {"counts": (1, 0)}, "counts = 0, but must be at least 1"),
        (Propose, {"counts": ()}, "counts = (), but must be at least 1 value"),
        (Propose, {"budgets": {"benign": 2}}, "budgets.benign = 2, but must be at most 1"),
        (
            Propose,
            {"start": "circuit"},
            "circuit is not given, but must be a file, as start is circuit",
        ),
        (Propose, {"features": "1,2"}, "features = '1,2', but must be left out, as start is contrast"),
        (
            Propose,
            {"start": "features", "features": "1"},
            "method = 'direction', but must be sae-feature, as start is features",
        ),
        (EditSettings, {"benign_weight": -1}, "benign_weight = -1, but must be at least 0"),
    ],
)
def test_value_out_of_range_is_one_line(settings: Any, change: dict[str, Any], line: str) -> None:
    """The line names field, value and remedy, for a single field and for two that contradict each other."""
    with pytest.raises(ValidationError) as caught:
        settings(**change)
    assert [fault.line() for fault in faults(caught.value)] == [line]
    with pytest.raises(ValidationError):
        replace(settings(), **change)


def test_largest_number_of_heads_is_the_engines() -> None:
    """The bound on heads is that of the engine, and not one below it."""
    assert GateSettings(layers=(1, 2), heads=2, probes=24).all_heads == 96


@pytest.mark.parametrize("settings", ALL)
def test_every_field_has_a_docstring(settings: Any) -> None:
    """The docstring is the help of the field's option; an unknown name is refused."""
    assert all(info.description for info in settings.__pydantic_fields__.values())
    with pytest.raises(ValidationError):
        settings(colour="red")


@pytest.mark.parametrize(
    ("plain", "sha256"),
    [
        (asdict(TraceSettings(layers=(9, 15))), "51762b89ce768d86"),
        (GateSettings(layers=(9, 12, 15)).trained(), "7d76983f44be35b7"),
        (asdict(EditSettings(layers=(16, 19, 22))), "7aef71ca6ee699f2"),
        (asdict(SearchSettings()), "f7bd97ff5e3be9d5"),
        (asdict(JobOptions("jailbreak")), "8a31cebb27a7ed48"),
        (_that_decide(ProposeSettings(contrast=Path("a/class.yaml"))), "da354f8073d74eea"),
    ],
)
def test_default_run_keeps_its_identity(plain: dict[str, Any], sha256: str) -> None:
    """What an unfinished run is recognised by, byte for byte: one that was begun with an earlier version of
    these settings resumes. A new field, default or order is another run, and changes a number here."""
    assert hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16] == sha256


def test_default_training_keeps_its_work_folder() -> None:
    """A training's folder is named by its settings and its trace, and the default's name does not change."""
    assert train_digest(TRACED, TrainSettings(layer=15, tokens=750_000)) == "37d1c37261bd6a55"


def test_whole_numbers_written_as_floats_are_the_same_run() -> None:
    """A library call's `k=32` and the command line's `32.0` are the same training."""
    whole, written = (TrainSettings(layer=1, tokens=2048, k=k) for k in (32, 32.0))
    assert train_digest(TRACED, whole) == train_digest(TRACED, written)
