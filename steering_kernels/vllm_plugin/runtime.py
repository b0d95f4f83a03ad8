"""Steering inside one worker: its tables, its hooks, and what it did for each request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interpretops.bank import PlanBank, SlotsOf
from interpretops.errors import PlanError
from interpretops.hook_points import SiteHooks
from interpretops.model_spec import read_model_spec
from interpretops.plan import HEAD_POINTS, POINTS, ModelSpec, Plan, Site
from steering_kernels.vllm_plugin.engine_config import EngineOptions
from steering_kernels.vllm_plugin.request_args import RequestArgs


@dataclass
class _Tracked:
    """One request that this worker is computing."""

    args: RequestArgs
    slot: int
    cached_tokens: int
    tokens_evaluated: int = 0


class SteeringRuntime:
    """What the runner adapters call: `begin_step` before a pass, `clear_step` before a dummy one."""

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        options: EngineOptions,
        *,
        max_requests: int,
        tensor_parallel: int,
        device: torch.device,
        memory_slots: Callable[[], int] | None = None,
    ) -> None:
        """``memory_slots``: how many tokens the key-value cache holds; None where that cannot be had."""
        self.tensor_parallel = tensor_parallel
        self._memory_slots = memory_slots
        sites = [Site(layer, point) for layer in range(spec.num_layers) for point in POINTS]
        self.bank = PlanBank(
            spec,
            sites,
            rows=options.rows,
            units_per_site=options.units_per_site,
            requests=2 * max_requests,
            device=device,
        )
        self.hooks = SiteHooks(
            model, self.bank, residual_pair=not type(model).__name__.startswith("Transformers")
        )
        self._edits_of_finished: Counter[str] = Counter()
        """Of requests that have ended, by the revisions that are resident."""
        self._free_slots = list(range(2 * max_requests))
        self._tracked: dict[str, _Tracked] = {}
        self._in_step: list[str] = []

    def load(self, plan: Plan) -> str:
        """Make a plan resident; returns the digest of what now stands in the tables."""
        if self.tensor_parallel > 1:
            sharded = [str(s) for s in self._sites_of(plan) if s.point in HEAD_POINTS]
            if sharded:
                raise PlanError(
                    f"plan {plan.policy_id!r} acts at {sharded}, but attention heads are split over "
                    f"{self.tensor_parallel} ranks here; use tensor_parallel_size 1 or another point"
                )
        if any(gate.scope == "prompt" for gate in plan.gates):
            if self._memory_slots is None:
                raise PlanError(
                    f"plan {plan.policy_id!r} has a gate of scope 'prompt', which vLLM's V2 runner does not "
                    "support yet; start the engine with VLLM_USE_V2_MODEL_RUNNER=0"
                )
            self.bank.keep_memory(self._memory_slots())
        self.bank.load(plan)
        self.hooks.refresh()
        return self.bank.digest(plan.revision)

    def unload(self, revision: str) -> None:
        """Free a revision's row."""
        self.bank.unload(revision)
        self._edits_of_finished.pop(revision, None)
        self.hooks.refresh()

    def attest(self) -> dict[str, Any]:
        """What stands in the tables now, read back from them."""
        edits = self._edits_of_finished.copy()
        for entry in self._tracked.values():
            if entry.args.revision is not None:
                edits[entry.args.revision] += int(self.bank.step.edited[entry.slot])
        return {
            "resident": {revision: self.bank.digest(revision) for revision in self.bank.row_of},
            "edits": dict(edits),
        }

    def track(self, request_id: str, extra_args: Mapping[str, Any] | None, cached_tokens: int) -> None:
        """A request is scheduled for the first time."""
        args = RequestArgs.read(extra_args)
        if request_id in self._tracked:  # resumed after preemption: gates stay fired where they fired
            return
        slot = self._free_slots.pop()
        self.bank.step.forget_request(slot)
        self._tracked[request_id] = _Tracked(args, slot, cached_tokens)

    def untrack(self, request_id: str) -> None:
        """A request has ended; unknown ones are ignored."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None:
            revision = tracked.args.revision
            if revision is not None and revision in self.bank.row_of:
                self._edits_of_finished[revision] += int(self.bank.step.edited[tracked.slot])
            self._free_slots.append(tracked.slot)

    def clear_step(self) -> None:
        """The coming pass carries no request."""
        self._in_step = []
        self.bank.step.clear()

    def begin_step(
        self,
        request_ids: Sequence[str],
        num_tokens: Sequence[int],
        first_position: Sequence[int],
        prompt_length: Sequence[int],
        memory_slots: SlotsOf | None = None,
    ) -> None:
        """Lay out the coming pass, in the batch's own order.

        Raises KeyError for a request that is not tracked or a revision that is not resident: then the pass
        must not run.
        """
        tracked = [self._tracked[request_id] for request_id in request_ids]
        self.bank.begin_step(
            revisions=[entry.args.revision for entry in tracked],
            slots=[entry.slot for entry in tracked],
            num_tokens=num_tokens,
            first_position=first_position,
            prompt_length=prompt_length,
            memory_slots=memory_slots,
        )
        self._in_step = list(request_ids)
        for entry, count in zip(tracked, num_tokens, strict=True):
            entry.tokens_evaluated += count

    def reports(self) -> Iterator[tuple[str, list[Any]]]:
        """For every request of the last pass, what was done for it since it began (see `receipts.Report`)."""
        step = self.bank.step
        edited, opened = (step.edited.tolist(), step.opened.tolist()) if step.active else ([], [])
        for request_id in self._in_step:
            entry = self._tracked.get(request_id)
            if entry is None:
                continue
            yield (
                request_id,
                [
                    entry.args.revision,
                    entry.args.nonce,
                    entry.tokens_evaluated,
                    edited[entry.slot] if edited else 0,
                    opened[entry.slot] if opened else 0,
                    entry.cached_tokens,
                ],
            )

    def _sites_of(self, plan: Plan) -> list[Site]:
        return [*plan.edits, *(gate.site for gate in plan.gates if gate.site is not None)]


def model_folder(model: str, revision: str | None) -> Path:
    """The folder of a model that the engine has loaded, be it named by folder or by Hugging Face id."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True))


def make_runtime(
    model: nn.Module, vllm_config: Any, device: torch.device, memory_slots: Callable[[], int] | None
) -> SteeringRuntime:
    """The runtime of a worker whose model has just been loaded; ``memory_slots`` as in `SteeringRuntime`."""
    spec = read_model_spec(model_folder(vllm_config.model_config.model, vllm_config.model_config.revision))
    return SteeringRuntime(
        model,
        spec,
        EngineOptions.read(vllm_config.additional_config),
        max_requests=vllm_config.scheduler_config.max_num_seqs,
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
        device=device,
        memory_slots=memory_slots,
    )
