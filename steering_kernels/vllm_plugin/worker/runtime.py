"""Steering in one worker: its tables, its hooks, and its record of what was done per request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interpretops.errors import ModelError, PlanError
from interpretops.model.spec import read_model_spec
from interpretops.plan import POINTS, ModelSpec, Plan, Site
from interpretops.plan.shard import Shard
from interpretops.steering.hook_points import SiteHooks, site_module
from interpretops.steering.plan_bank import PlanBank, SlotsOf
from steering_kernels.ops import SumRanks, empty_slots
from steering_kernels.vllm_plugin.engine_config import EngineOptions
from steering_kernels.vllm_plugin.request_args import RequestArgs
from steering_kernels.vllm_plugin.worker.report import Report, StepReports


@dataclass
class _Tracked:
    """A request that this worker is processing."""

    args: RequestArgs
    slot: int
    cached_tokens: int
    """Tokens that came from the prefix cache, at first or after a preemption."""
    tokens_evaluated: int = 0
    reached: int = 0
    """Number of leading tokens that were computed or found in the cache."""


class SteeringRuntime:
    """Called by the runner adapters: `begin_step` before a pass, `clear_step` before a dummy pass."""

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        options: EngineOptions,
        *,
        max_requests: int,
        device: torch.device,
        memory_slots: Callable[[], int] | None = None,
        shard: Shard = Shard(),  # noqa: B008 (frozen)
        sum_ranks: SumRanks | None = None,
        compiled: bool = False,
        graph_tokens: int = 0,
    ) -> None:
        """``memory_slots``: returns how many tokens the KV cache holds; None if unknown.

        ``compiled``: the model will be compiled, so that plans may act only at the options' points.

        ``graph_tokens``: tokens of the largest whole-model graph, if such graphs contain the op.

        ``sum_ranks``: sums over the ranks that share the model's heads.
        """
        self.spec, self.shard = spec, shard
        self._memory_slots = memory_slots
        self.points = tuple(p for p in POINTS if not compiled or p in options.compiled_points)
        sites = [Site(layer, point) for layer in range(spec.num_layers) for point in self.points]
        self.bank = PlanBank(
            shard.of_model(spec),
            sites,
            rows=options.rows,
            units_per_site=options.units_per_site,
            requests=2 * max_requests,
            device=device,
            sum_ranks=sum_ranks,
            graph_tokens=graph_tokens,
        )
        self.replays = graph_tokens > 0
        self.hooks = SiteHooks(
            model,
            self.bank,
            residual_pair=not type(model).__name__.startswith("Transformers"),
            fixed=sites if compiled else (),
        )
        self._finished_edits = torch.zeros(options.rows, dtype=torch.int64, device=device)
        """Edits of finished requests, by row."""
        self.warming_up = False
        """Whether vLLM is running its own warm-up requests, which name no policy."""
        self._free_slots = list(range(2 * max_requests))
        self._tracked: dict[str, _Tracked] = {}
        self._in_step: list[str] = []

    def load(self, plan: Plan) -> str:
        """Make a plan resident; returns the digest read back from the tables."""
        own = self.shard.of_plan(plan)
        self._check_points(plan)
        if any(gate.probe for gate in plan.gates):
            if self._memory_slots is None:
                raise PlanError(
                    f"plan {plan.policy_id!r} has an attention probe, but the size of this model's KV "
                    "cache is unknown"
                )
            self._keep_memory(self._memory_slots())
        self.bank.load(own, plan.revision)
        self.hooks.refresh()
        return self.bank.digest(plan.revision)

    def _keep_memory(self, slots: int) -> None:
        try:
            self.bank.keep_memory(slots)
        except torch.OutOfMemoryError as error:
            raise PlanError(
                f"gates of scopes 'prompt' and 'answer' need memory for the readings of {slots} KV-cache "
                "slots, but the device has none left; lower --gpu-memory-utilization"
            ) from error

    def _check_points(self, plan: Plan) -> None:
        reads = [site for gate in plan.gates for site in (gate.site, *(p.site for p in gate.probe)) if site]
        unavailable = [str(site) for site in (*plan.edits, *reads) if site.point not in self.points]
        if unavailable:
            raise PlanError(
                f"plan {plan.policy_id!r} acts at {unavailable[0]}, but this engine's model is compiled with "
                f"edit sites only at {', '.join(self.points)}; add the point to --additional-config "
                "interpretops.points, or start the engine with --enforce-eager"
            )

    def unload(self, revision: str) -> None:
        """Free a revision's row."""
        row = self.bank.row_of.get(revision)
        if row is not None:
            self._finished_edits[row] = 0
        self.bank.unload(revision)
        self.hooks.refresh()

    def resident(self) -> dict[str, str]:
        """Revision to the digest of its rows, read back from the tables."""
        return {revision: self.bank.digest(revision) for revision in self.bank.row_of}

    def edits(self) -> dict[str, int]:
        """Revision to the (token, site) pairs that were edited under it; those with none are left out."""
        finished, running = self._finished_edits.tolist(), self.bank.step.edited.tolist()
        edits = {revision: finished[row] for revision, row in self.bank.row_of.items()}
        for entry in self._tracked.values():
            if entry.args.revision in edits:
                edits[entry.args.revision] += running[entry.slot]
        return {revision: count for revision, count in edits.items() if count}

    def track(self, request_id: str, extra_args: Mapping[str, Any] | None, cached_tokens: int) -> None:
        """Start tracking a request that is scheduled for the first time."""
        is_warm_up = self.warming_up and not extra_args
        args = RequestArgs(None, "") if is_warm_up else RequestArgs.read(extra_args)
        if request_id in self._tracked:  # resumed after preemption: its gates keep where they fired
            return
        slot = self._free_slots.pop()
        self.bank.step.forget_request(slot)
        self._tracked[request_id] = _Tracked(args, slot, cached_tokens, reached=cached_tokens)

    def untrack(self, request_id: str) -> None:
        """Stop tracking a finished request; ignores unknown ones."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None:
            row = self.bank.row_of.get(tracked.args.revision or "")
            if row is not None:  # summed on the device, so nothing waits for the GPU
                self._finished_edits[row].add_(self.bank.step.edited[tracked.slot])
            self._free_slots.append(tracked.slot)

    def end_warm_up(self, dtype: torch.dtype) -> None:
        """Compile the op's kernels before the first real request.

        Raises RuntimeError if a warm-up request of vLLM is still tracked.
        """
        if self._tracked:
            raise RuntimeError(f"vLLM's warm-up left requests behind: {', '.join(sorted(self._tracked))}")
        self.clear_step()
        if self.bank.device.type == "cuda":
            self.bank.compile_kernels(self.points, dtype, pair=self.hooks.residual_pair)

    def clear_step(self) -> None:
        """Lay out a pass without requests."""
        self._in_step = []
        self.bank.step.clear()

    def end_step(self) -> None:
        """End the pass. The next one must be laid out (`begin_step`) before it runs."""
        self._in_step = []
        self.bank.step.end()

    @property
    def keeps_readings(self) -> bool:
        """Whether gates store readings per KV-cache slot, so that new blocks must be emptied."""
        return self.bank.step.memory is not None

    def empty_blocks(self, blocks: Sequence[int], block_size: int) -> None:
        """Erase the readings of earlier owners of these KV-cache blocks."""
        memory = self.bank.step.memory
        if blocks and memory is not None:
            empty_slots(memory, torch.tensor(blocks, device=memory.device), block_size)

    def begin_step(
        self,
        request_ids: Sequence[str],
        num_tokens: Sequence[int],
        first_position: Sequence[int],
        prompt_length: Sequence[int],
        memory_slots: SlotsOf | None = None,
        *,
        replayed: bool = False,
    ) -> None:
        """Lay out the next pass, in batch order.

        ``replayed``: the pass is replayed from a whole-model graph. Raises KeyError for a request that is not
        tracked or a revision that is not resident, and RuntimeError if the graph cannot do what the requests
        require. The pass must then not run.
        """
        if replayed:
            in_prompt = [begin < end for begin, end in zip(first_position, prompt_length, strict=True)]
            if not self.may_replay(request_ids, in_prompt):
                raise RuntimeError(
                    "a step with a gate that must read activations was about to be replayed from a graph"
                )
        tracked = [self._tracked[request_id] for request_id in request_ids]
        self.bank.begin_step(
            revisions=[entry.args.revision for entry in tracked],
            slots=[entry.slot for entry in tracked],
            num_tokens=num_tokens,
            first_position=first_position,
            prompt_length=prompt_length,
            memory_slots=memory_slots,
        )
        if replayed:
            self.bank.decide_gates()
        self._in_step = list(request_ids)
        for entry, first, count in zip(tracked, first_position, num_tokens, strict=True):
            # A preempted request can find tokens in the cache that other requests computed meanwhile.
            entry.cached_tokens += max(0, first - entry.reached)
            entry.reached = max(entry.reached, first + count)
            entry.tokens_evaluated += count

    def may_replay(self, request_ids: Sequence[str], in_prompt: Sequence[bool]) -> bool:
        """See `PlanBank.may_replay`. If graphs contain the op, raises KeyError for an untracked request."""
        if not self.replays:
            return False
        revisions = [self._tracked[request_id].args.revision for request_id in request_ids]
        return self.bank.may_replay(revisions, in_prompt)

    def reports(self) -> StepReports:
        """Cumulative reports of all requests in the last pass."""
        step, found = self.bank.step, []
        for request_id in self._in_step:
            entry = self._tracked.get(request_id)
            if entry is None:
                continue
            args = entry.args
            report = Report(args.revision, args.nonce, entry.tokens_evaluated, 0, 0, entry.cached_tokens)
            found.append((request_id, report, entry.slot))
        return StepReports(found, [step.edited, step.opened, step.refused] if found and step.active else [])


def model_folder(model: str, revision: str | None) -> Path:
    """The folder of the engine's model, which is given as a folder or a Hugging Face id."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True))


def make_runtime(
    model: nn.Module, vllm_config: Any, device: torch.device, memory_slots: Callable[[], int] | None
) -> SteeringRuntime:
    """The runtime of a worker whose model has just been loaded; ``memory_slots`` as in `SteeringRuntime`."""
    spec = read_model_spec(model_folder(vllm_config.model_config.model, vllm_config.model_config.revision))
    shard, sum_ranks = _ranks(vllm_config.parallel_config.tensor_parallel_size)
    runtime = SteeringRuntime(
        model,
        spec,
        EngineOptions.read(vllm_config.additional_config),
        max_requests=vllm_config.scheduler_config.max_num_seqs,
        device=device,
        memory_slots=memory_slots,
        shard=shard,
        sum_ranks=sum_ranks,
        compiled=not vllm_config.model_config.enforce_eager,
        graph_tokens=_graph_tokens(vllm_config),
    )
    _check_split(runtime)
    return runtime


def _graph_tokens(vllm_config: Any) -> int:
    """Tokens of the largest whole-model CUDA graph, which contains the op; 0 if there are none."""
    compilation = vllm_config.compilation_config
    whole = compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs()
    if vllm_config.model_config.enforce_eager or not vllm_config.use_v2_model_runner or not whole:
        return 0
    return int(max(compilation.cudagraph_capture_sizes or [0]))


def _ranks(tensor_parallel: int) -> tuple[Shard, SumRanks | None]:
    """This worker's tensor-parallel shard, and a function that sums over all ranks."""
    if tensor_parallel == 1:
        return Shard(), None
    from vllm.distributed import get_tp_group

    group = get_tp_group()

    def sum_ranks(part: Tensor) -> Tensor:
        # vLLM's all-reduces only support the model's dtypes; these sums are in float64.
        torch.distributed.all_reduce(part, group=group.device_group)
        return part

    return Shard(group.rank_in_group, tensor_parallel), sum_ranks


def _check_split(runtime: SteeringRuntime) -> None:
    """Raise `ModelError` unless each layer's heads are split over the ranks in the same way as plans."""
    spec, hooks = runtime.bank.spec, runtime.hooks
    if runtime.shard.count == 1:
        return
    expected = spec.num_heads * spec.head_dim
    for layer in range(spec.num_layers):
        projection = site_module(hooks.layers, hooks.family, Site(layer, "attn_z"))
        found = getattr(projection, "input_size_per_partition", None)
        if found != expected:
            raise ModelError(
                f"layer {layer}: the attention projection has {found} columns on this rank, but must have "
                f"{expected} with heads split evenly over {runtime.shard.count} tensor-parallel ranks"
            )
