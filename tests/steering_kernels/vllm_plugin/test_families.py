"""A plan in vLLM and in the SDK gives the same log-probabilities: each family, and the default model."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_families import CONFIGS, PROMPT, gate_plan, save_family

from interpretops import HookedModel, SteeringSession
from interpretops.plan import ALWAYS, POINTS, Array, Gate, Plan, Site, SiteEdits, Units

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROGRAM = Path(__file__).with_name("logprobs_program.py")
TOLERANCE = 2e-5
"""Between float32 log-probabilities of vLLM and of transformers; measured: below 3e-6."""
BFLOAT16 = 0.5
"""Between log-probabilities of the 20 likeliest tokens of two bfloat16 implementations of one model."""
ANSWER = 6


@dataclass(frozen=True)
class Answer:
    """What an engine made of one request."""

    ids: npt.NDArray[np.int64]
    """[T, K] of which tokens it tells, after each token but the last generated one; -1 for none"""
    values: Array
    """[T, K] their log-probabilities"""
    tokens: list[int]
    receipt: dict[str, Any]

    def distances(self, rows: Array) -> Array:
        """[T] largest distance from log-probabilities [T, V]."""
        expected = np.take_along_axis(rows, self.ids.clip(min=0), axis=1)
        largest: Array = np.where(self.ids < 0, 0.0, np.abs(self.values - expected)).max(axis=1)
        return largest


def run_engine(
    folder: Path,
    model: Path,
    plans: Sequence[Plan],
    requests: list[dict[str, Any]],
    logprobs: int = -1,
    **engine: Any,
) -> list[Answer]:
    """Answer a batch in an engine in a process of its own."""
    job, result, log = folder / "job.json", folder / "result.npz", folder / "log.txt"
    arguments = {"max_model_len": 64, "max_num_seqs": 4, "block_size": 32} | engine
    files = [str(plan.save(folder)) for plan in plans]
    job.write_text(
        json.dumps(
            {
                "model": str(model),
                "engine": arguments,
                "plans": files,
                "requests": requests,
                "logprobs": logprobs,
            }
        )
    )
    with log.open("wb") as stream:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(job), str(result)],
            env=os.environ | {"VLLM_PLUGINS": "interpretops", "VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=400,
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    found = np.load(result)
    return [
        Answer(
            found[f"ids_{index}"],
            found[f"values_{index}"],
            found[f"tokens_{index}"].tolist(),
            json.loads(str(found[f"receipt_{index}"])),
        )
        for index in range(len(requests))
    ]


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_engine_agrees_with_the_sdk(architecture: str, tmp_path: Path) -> None:
    """Edits at every point, head scales and gates: in one batch the steered request gets the SDK's numbers
    and its receipt, the other the unsteered model's."""
    folder = save_family(architecture, tmp_path)
    model = HookedModel(folder, dtype="float32")
    stream: Array = model.run_with_cache(PROMPT, ["0.resid_post"])[Site(0, "resid_post")].numpy()
    plan = gate_plan(model.spec, stream)
    requests = [
        {"prompt": PROMPT, "revision": revision, "max_tokens": ANSWER} for revision in (plan.revision, "none")
    ]
    steered, plain = run_engine(tmp_path, folder, [plan], requests, dtype="float32")

    with SteeringSession(model, plan) as steer:
        expected = steer.logprobs((PROMPT + steered.tokens)[:-1], prompt_length=len(PROMPT)).numpy()
        receipt = steer.receipt
    unsteered = model.logprobs((PROMPT + plain.tokens)[:-1]).numpy()
    assert plain.ids.shape == unsteered.shape
    assert plain.distances(unsteered).max() < TOLERANCE
    assert steered.distances(expected).max() < TOLERANCE
    assert np.abs(expected[: len(PROMPT)] - unsteered[: len(PROMPT)]).max() > 0.1
    for name in ("revision", "tokens_evaluated", "edits_applied", "gates_fired"):
        assert steered.receipt[name] == getattr(receipt, name)
    assert (plain.receipt["revision"], plain.receipt["edits_applied"]) == ("none", 0)


def test_engine_agrees_with_the_sdk_on_the_default_model(default_model_dir: Path, tmp_path: Path) -> None:
    """In bfloat16, with edits at every point and a latch, steering adds nothing to what two implementations
    of the unsteered model differ by."""
    model = HookedModel(default_model_dir, dtype="bfloat16")
    tokens = model.tokens("What is the sea? Answer in one sentence, please.")
    plan = layered_plan(model, tokens)
    requests = [
        {"prompt": tokens, "revision": revision, "max_tokens": 16} for revision in (plan.revision, "none")
    ]
    steered, plain = run_engine(
        tmp_path, default_model_dir, [plan], requests, 20, dtype="bfloat16", max_model_len=256
    )
    with SteeringSession(model, plan) as steer:
        expected = steer.logprobs((tokens + steered.tokens)[:-1], prompt_length=len(tokens)).numpy()
        receipt = steer.receipt
    unsteered = model.logprobs((tokens + plain.tokens)[:-1]).numpy()
    ours, theirs = steered.distances(expected), plain.distances(unsteered)
    print("steered", np.median(ours), ours.max(), "unsteered", np.median(theirs), theirs.max())
    assert steered.tokens != plain.tokens
    assert steered.receipt["tokens_evaluated"] == receipt.tokens_evaluated
    assert theirs.max() < BFLOAT16
    assert ours.max() < BFLOAT16
    assert np.median(ours) < 1.5 * np.median(theirs)


def layered_plan(model: HookedModel, tokens: list[int]) -> Plan:
    """A direction added and one removed at every point of layer 15, half of it from one token on."""
    rng = np.random.default_rng(3)
    (stream,) = (x.float().numpy() for x in model.run_with_cache(tokens, ["8.resid_post"]).values())
    read = np.linalg.pinv(stream[1:].astype(np.float64))[:, 9]
    gate = Gate(
        Site(8, "resid_post"),
        read[None].astype(np.float32),
        np.zeros(1, np.float32),
        np.full(1, 0.5, np.float32),
        latched=True,
        max_norm=2000.0,
    )
    edits = {}
    for site in (Site(15, point) for point in POINTS):
        sizes = model.run_with_cache(tokens, [site])[site].float()[1:].norm(dim=1).median().item()
        width, read_width = model.spec.width(site.point), model.spec.read_width(site.point)
        reads, writes = rng.normal(size=(2, read_width)), rng.normal(size=(2, width))
        reads, writes = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (reads, writes))
        infinite = np.full(2, np.inf)
        values = {
            "read": reads * [[0.0], [1.0]],
            "write": writes,
            "bias": np.zeros(2),
            "threshold": -infinite,
            "gain": np.array([0.0, -1.0]),
            "offset": np.array([0.4 * sizes, 0.0]),
            "low": -infinite,
            "high": infinite,
            "max_norm": np.full(2, 2000.0),
        }
        edits[site] = SiteEdits(
            Units(
                **{name: value.astype(np.float32) for name, value in values.items()},
                gate=np.array([1, 0], np.int32),
                topk=np.full(2, -1, np.int32),
            )
        )
    return Plan("layered", "test", model.spec, edits, (ALWAYS, gate))
