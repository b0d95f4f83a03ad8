"""A plan gives the same log-probabilities in vLLM and in the SDK: each model family, and the default
model."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_families import CONFIGS, FIRES_AT, PROMPT, gate_plan, save_family
from vllm_fork_server import ForkServer

from interpretops import HookedModel, SteeringSession
from interpretops.plan import ALWAYS, POINTS, Array, Gate, Plan, Site, SiteEdits, Units
from interpretops.plan.shard import Shard

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROGRAM = Path(__file__).with_name("logprobs_program.py")
FAMILIES = 2e-5
"""Tolerance between float32 log-probabilities of tiny models in vLLM and in transformers."""
DEFAULT_MODEL = {"float32": 5e-4, "bfloat16": 1.0}
"""The same for the 20 likeliest tokens of the default model, whose logits are rounded to steps of 1/8 in
bfloat16; what each test below asks besides is that steering makes it no worse."""
_EIGHT: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
PARALLEL: list[tuple[str, str, dict[str, Any], int]] = [
    ("eight heads on one rank", "LlamaForCausalLM", _EIGHT, 1),
    ("eight heads on two ranks", "LlamaForCausalLM", _EIGHT, 2),
    ("GPT-NeoX on two ranks", "GPTNeoXForCausalLM", {"num_attention_heads": 8, "hidden_size": 256}, 2),
]
"""Job, architecture, its settings, tensor-parallel ranks."""
COMPILED = {
    "enforce_eager": False,
    "additional_config": {"interpretops": {"points": ",".join(POINTS)}},
}
"""A compiled engine with edit sites at every point."""
QUESTION = "What is the sea? Answer in one sentence, please."


@dataclass(frozen=True)
class Answer:
    """An engine's result for one request."""

    ids: npt.NDArray[np.int64]
    """[T, K] ids of the reported tokens, after each token but the last generated one; -1 for none"""
    values: Array
    """[T, K] their log-probabilities"""
    tokens: list[int]
    receipt: dict[str, Any]

    def distances(self, rows: Array) -> Array:
        """[T] largest distance from log-probabilities [T, V]."""
        assert len(rows) == len(self.ids)
        expected = np.take_along_axis(rows, self.ids.clip(min=0), axis=1)
        largest: Array = np.where(self.ids < 0, 0.0, np.abs(self.values - expected)).max(axis=1)
        return largest


@dataclass(frozen=True)
class Job:
    """A batch of two for its own engine: one prompt under a plan, and the same without."""

    folder: Path
    model: HookedModel
    plan: Plan
    prompt: list[int]
    new_tokens: int

    def write(self, logprobs: int, **engine: Any) -> None:
        dtype = str(self.model.dtype).removeprefix("torch.")
        record = {
            "model": str(self.model.folder),
            "engine": {"dtype": dtype, "max_model_len": 128, "max_num_seqs": 4, "block_size": 32} | engine,
            "plans": [str(self.plan.save(self.folder))],
            "requests": [
                {"prompt": self.prompt, "revision": revision, "max_tokens": self.new_tokens}
                for revision in (self.plan.revision, "none")
            ],
            "logprobs": logprobs,
        }
        (self.folder / "job.json").write_text(json.dumps(record))

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """The attestation of each rank of the engine."""
        attested = json.loads(str(np.load(self.folder / "result.npz")["attested"]))
        return list(attested["ranks"])

    @cached_property
    def answers(self) -> tuple[Answer, Answer]:
        """The engine's, steered and plain."""
        result = self.folder / "result.npz"
        assert result.exists(), (self.folder / "log.txt").read_text()[-3000:]
        found = np.load(result)
        steered, plain = (
            Answer(
                found[f"ids_{index}"],
                found[f"values_{index}"],
                found[f"tokens_{index}"].tolist(),
                json.loads(str(found[f"receipt_{index}"])),
            )
            for index in range(2)
        )
        return steered, plain

    def check(self) -> tuple[Array, Array, Array]:
        """Distances [T] of vLLM from the SDK, steered and plain, and of steered from plain on the prompt.

        The receipts must agree exactly.
        """
        steered, plain = self.answers
        with SteeringSession(self.model, self.plan) as steer:
            tokens = (self.prompt + steered.tokens)[:-1]
            expected = steer.logprobs(tokens, prompt_length=len(self.prompt)).numpy()
            receipt = steer.receipt
        unsteered = self.model.logprobs((self.prompt + plain.tokens)[:-1]).numpy()
        for name in ("revision", "tokens_evaluated", "edits_applied", "gates_fired"):
            assert steered.receipt[name] == getattr(receipt, name)
        assert (plain.receipt["revision"], plain.receipt["edits_applied"]) == ("none", 0)
        length = len(self.prompt)
        effect: Array = np.abs(expected[:length] - unsteered[:length]).max(axis=1)
        return steered.distances(expected), plain.distances(unsteered), effect


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory: pytest.TempPathFactory, default_model_dir: Path, fork_server: ForkServer
) -> dict[str, Job]:
    """All jobs, by family or by number format of the default model, after their engines have run."""
    made = {}
    for architecture in CONFIGS:
        folder = tmp_path_factory.mktemp(architecture)
        model = HookedModel(save_family(architecture, folder), dtype="float32")
        stream: Array = model.run_with_cache(PROMPT, ["0.resid_post"])[Site(0, "resid_post")].numpy()
        made[architecture] = Job(folder, model, gate_plan(model.spec, stream), PROMPT, 6)
        made[architecture].write(logprobs=-1)
    for dtype in DEFAULT_MODEL:
        model = HookedModel(default_model_dir, dtype=dtype)
        tokens = model.tokens(QUESTION)
        made[dtype] = Job(tmp_path_factory.mktemp(dtype), model, layered_plan(model, tokens), tokens, 16)
        made[dtype].write(logprobs=20)
    answer(fork_server, made)
    return made


@pytest.fixture(scope="module")
def compiled_job(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Job:
    """A plan at every point, loaded into an engine that has already compiled its model."""
    folder = tmp_path_factory.mktemp("compiled")
    model = HookedModel(save_family("LlamaForCausalLM", folder), dtype="float32")
    stream: Array = model.run_with_cache(PROMPT, ["0.resid_post"])[Site(0, "resid_post")].numpy()
    made = Job(folder, model, gate_plan(model.spec, stream), PROMPT, 6)
    made.write(logprobs=-1, **COMPILED)
    answer(fork_server, {"compiled": made}, VLLM_CACHE_ROOT=str(tmp_path_factory.mktemp("cache")))
    return made


@pytest.mark.timeout(1200)
def test_compiled_engine_agrees_with_the_sdk(compiled_job: Job) -> None:
    """A model compiled before the plan was loaded applies its edits, and without a plan none."""
    steered, plain, effect = compiled_job.check()
    assert "saved AOT compiled" in (compiled_job.folder / "log.txt").read_text()
    assert plain.max() < FAMILIES
    assert steered.max() < FAMILIES
    assert effect.max() > 0.1


@pytest.fixture(scope="module")
def parallel_jobs(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> dict[str, Job]:
    """The same for `PARALLEL`, by name."""
    made = {}
    for name, architecture, settings, ranks in PARALLEL:
        folder = tmp_path_factory.mktemp("parallel")
        model = HookedModel(save_family(architecture, folder, **settings), dtype="float32")
        made[name] = Job(folder, model, parallel_plan(model), PROMPT, 6)
        made[name].write(logprobs=-1, tensor_parallel_size=ranks)
    answer(fork_server, made)
    return made


def answer(fork_server: ForkServer, jobs: dict[str, Job], **environment: str) -> None:
    """Have engines answer all jobs."""
    folders = [job.folder for job in jobs.values()]
    log = folders[0] / "program.txt"
    settings = {"VLLM_PLUGINS": "interpretops", "VLLM_CPU_KVCACHE_SPACE": "1"} | environment
    status = fork_server.run(PROGRAM, *folders, log=log, timeout_s=900, **settings)
    assert status == 0, log.read_text()[-3000:]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_engine_agrees_with_the_sdk(architecture: str, jobs: dict[str, Job]) -> None:
    """Edits at every point, head scales and gates: in one batch the steered request matches the SDK's numbers
    and receipt, and the other the unsteered model's."""
    steered, plain, effect = jobs[architecture].check()
    print(architecture, steered.max(), plain.max(), effect.max())
    assert plain.max() < FAMILIES
    assert steered.max() < FAMILIES
    assert effect.max() > 0.1


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", list(DEFAULT_MODEL))
def test_engine_agrees_with_the_sdk_on_the_default_model(dtype: str, jobs: dict[str, Job]) -> None:
    """With edits at every point and a latch, vLLM and the SDK differ no more than they do unsteered."""
    steered, plain, effect = jobs[dtype].check()
    print(dtype, "largest", steered.max(), plain.max(), "median", np.median(steered), np.median(plain))
    assert plain.max() < DEFAULT_MODEL[dtype]
    assert steered.max() < DEFAULT_MODEL[dtype]
    assert np.median(steered) < 1.5 * np.median(plain)
    assert np.median(effect) > 1.0


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name, _, _, ranks in PARALLEL if ranks > 1])
def test_two_ranks_agree_with_the_sdk(name: str, parallel_jobs: dict[str, Job]) -> None:
    """With heads split over two ranks, cross-rank reads, gates and head scales give the same numbers, and the
    receipt counts each edit once."""
    steered, plain, effect = parallel_jobs[name].check()
    print(name, steered.max(), plain.max(), effect.max())
    assert plain.max() < FAMILIES
    assert steered.max() < FAMILIES
    assert effect.max() > 0.1


@pytest.mark.timeout(1200)
def test_two_ranks_answer_as_one_does(parallel_jobs: dict[str, Job]) -> None:
    """The same tokens and the same receipt, steered and plain."""
    for one, two in zip(
        parallel_jobs[PARALLEL[0][0]].answers, parallel_jobs[PARALLEL[1][0]].answers, strict=True
    ):
        assert one.tokens == two.tokens
        assert one.receipt == two.receipt


@pytest.mark.timeout(1200)
def test_each_rank_attests_its_own_shard(parallel_jobs: dict[str, Job]) -> None:
    """Two ranks hold different halves, each with its shard's digest, and both apply edits."""
    job = parallel_jobs[PARALLEL[1][0]]
    assert [(rank["shard"], rank["shards"]) for rank in job.ranks] == [(0, 2), (1, 2)]
    digests = [rank["resident"][job.plan.revision] for rank in job.ranks]
    assert digests == [Shard(index, 2).of_plan(job.plan).digest() for index in range(2)]
    assert len({*digests, job.plan.digest()}) == 3
    edits = [rank["edits"][job.plan.revision] for rank in job.ranks]
    assert edits == [job.answers[0].receipt["edits_applied"]] * 2
    assert edits[0] > 0


def parallel_plan(model: HookedModel) -> Plan:
    """Edits at every point, with gates on the residual stream and on the heads; one reads a single head."""
    found = model.run_with_cache(PROMPT, ["0.resid_post", "1.attn_z"])
    stream, heads = (found[Site(0, "resid_post")].numpy(), found[Site(1, "attn_z")].numpy())
    plan = gate_plan(model.spec, stream)
    read = np.linalg.pinv(heads.astype(np.float64))[:, FIRES_AT][None].astype(np.float32)
    half = np.full(1, 0.5, np.float32)
    gate = Gate(Site(1, "attn_z"), read, 0 * half, half, max_norm=1e6)
    edits = dict(plan.edits)
    units = edits[Site(1, "attn_proj")].units
    one_head = units.read.copy()
    one_head[:, model.spec.head_dim :] = 0
    indices = units.gate.copy()
    indices[4:6] = len(plan.gates)
    edits[Site(1, "attn_proj")] = SiteEdits(replace(units, read=one_head, gate=indices))
    return replace(plan, edits=edits, gates=(*plan.gates, gate))


def layered_plan(model: HookedModel, tokens: list[int]) -> Plan:
    """At every point of layer 15: a direction added from one token on, another removed throughout."""
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
        size = model.run_with_cache(tokens, [site])[site].float()[1:].norm(dim=1).median().item()
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
            "offset": np.array([0.4 * size, 0.0]),
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
