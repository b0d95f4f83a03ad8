"""A steering session: applies one policy to a Hugging Face model, and restores the model at the end.

Shape letters: B sequences, T tokens of a pass, P tokens already in the key-value cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from interpretops.compile import compile_policy
from interpretops.errors import ModelError, PlanError, PolicyError, refused_plainly
from interpretops.plan import Plan, read_plan
from interpretops.plan.reach import depends_on_prompt_end
from interpretops.policy import Policy, load_policy
from interpretops.settings import load_settings
from interpretops.steering.batch_layout import check_positions, real_spans
from interpretops.steering.generation import CacheWatch, FollowedGeneration
from interpretops.steering.hook_points import SiteHooks
from interpretops.steering.hooked_model import HookedModel
from interpretops.steering.plan_bank import PlanBank

MAX_SEQUENCES = 512
"""The largest number of sequences in a batch."""

_STEERED: set[int] = set()
"""ids of the transformers models that an open session steers."""


@dataclass(frozen=True)
class SteeringReceipt:
    """What the session did in its latest request: since the key-value cache was last empty."""

    policy_id: str
    revision: str
    tokens_evaluated: int
    """Tokens that passed through the model, without padding."""
    edits_applied: int
    """(token, site) pairs that were changed."""
    gates_fired: int
    """(token, gate) pairs at which a conditional gate was open."""


class SteeringSession:
    """Steers a model by a policy inside a ``with`` block.

        with SteeringSession(model, "policies/calm.yaml") as steer:
            print(steer.generate("Hello"))

    Inside, every pass of ``model.network`` is steered, including batches padded on the left or right. A
    request begins with an empty key-value cache: its first pass is its prompt, and latched gates are closed.
    Without a cache, each ``network.generate`` call is one request, however often it runs the prompt again.
    Unsupported generation modes are refused (`interpretops.steering.generation`).
    """

    @refused_plainly
    def __init__(
        self,
        model: HookedModel,
        policy: Policy | Plan | str | Path,
        *,
        artifacts: str | Path | None = None,
    ) -> None:
        """
        policy     a policy, a plan, or the file of either (`.yaml`, `.safetensors`)
        artifacts  folder of dictionaries and adapters; by default the one in the settings

        Raises `PolicyError` or `PlanError` if it cannot be loaded or is for another model.
        """
        self.model = model
        self.plan = _plan(model, policy, artifacts)
        self.revision = self.plan.revision
        self._bank: PlanBank | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._hooks: SiteHooks | None = None
        self._signature = inspect.signature(model.network.base_model.forward)
        self._demanded_prompt_length: int | None = None
        self._generation = FollowedGeneration(model.network)
        self._cache = CacheWatch()
        self._uncached: Tensor | None = None
        """Input of the latest pass without a cache; kept for plans that must know where the prompt ends."""
        self._prompt_length: list[int] = []
        self._seen = 0
        self._evaluated = 0

    def __enter__(self) -> Self:
        network = self.model.network
        if id(network) in _STEERED:
            raise ModelError(f"{self.model.spec.name} is being steered by another session; leave that first")
        self._bank = _bank(self.model, self.plan)
        self._hooks = SiteHooks(network, self._bank, residual_pair=False, in_place=False)
        _STEERED.add(id(network))
        self._hooks.refresh()
        body = network.base_model
        self._handles = [
            body.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            body.register_forward_hook(self._after_pass, always_call=True),
        ]
        self._generation.install()
        self._prompt_length, self._seen, self._evaluated = [], 0, 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._hooks is not None:
            self._hooks.remove()
            self._generation.remove()
        self._cache.remember(None)
        self._uncached = None
        _STEERED.discard(id(self.model.network))
        self._hooks = None

    def generate(
        self,
        text: str,
        max_new_tokens: int = 64,
        *,
        chat: bool | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:
        """The steered answer to a text; for arguments see `HookedModel.generate`."""
        self._check_open()
        return self.model.generate(text, max_new_tokens, chat=chat, temperature=temperature, seed=seed)

    def logprobs(self, token_ids: Sequence[int], *, prompt_length: int | None = None) -> Tensor:
        """[T, V] float32, steered; the first ``prompt_length`` tokens are the prompt, all of them if None."""
        self._check_open()
        if prompt_length is not None and not 1 <= prompt_length <= len(token_ids):
            raise ValueError(f"prompt_length = {prompt_length}, but must be in 1..{len(token_ids)}")
        self._demanded_prompt_length = prompt_length
        try:
            return self.model.logprobs(token_ids)
        finally:
            self._demanded_prompt_length = None

    @property
    def receipt(self) -> SteeringReceipt:
        """What the session did in the latest request; also available after the session."""
        if self._bank is None:
            raise ModelError(
                "no receipt: the session was never entered; use `with SteeringSession(…) as steer`"
            )
        step, count = self._bank.step, len(self._prompt_length)
        return SteeringReceipt(
            self.plan.policy_id,
            self.revision,
            self._evaluated,
            int(step.edited[:count].sum()),
            int(step.opened[:count].sum()),
        )

    def _check_open(self) -> None:
        if self._hooks is None:
            raise ModelError("the session is not open; use `with SteeringSession(…) as steer`")

    def _before_pass(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare the next pass from the arguments of the model call."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        inputs = given.get("input_ids")
        if inputs is None:
            inputs = given["inputs_embeds"]
        batch, tokens = int(inputs.shape[0]), int(inputs.shape[1])
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        spans = real_spans(given.get("attention_mask"), batch, past, tokens)
        check_positions(given.get("position_ids"), spans, past)
        if not past:
            self._note_uncached(inputs)
        self._admit(batch, past, spans)
        if past:
            self._cache.check(cache)
        layout = [
            entry
            for sequence, span in enumerate(spans)
            for entry in self._entries(sequence, span, past, tokens)
        ]
        assert self._bank is not None
        self._bank.begin_step(
            revisions=[revision for revision, _, _, _ in layout],
            slots=[slot for _, slot, _, _ in layout],
            num_tokens=[count for _, _, count, _ in layout],
            first_position=[position for _, _, _, position in layout],
            prompt_length=[self._prompt_length[slot] for _, slot, _, _ in layout],
            memory_slots=lambda place, position: self._memory_slots(
                np.array([slot for _, slot, _, _ in layout])[place], position
            ),
        )
        self._seen = past + tokens
        self._evaluated += sum(count for revision, _, count, _ in layout if revision is not None)

    def _memory_slots(self, sequence: npt.NDArray[np.int64], position: npt.NDArray[np.int64]) -> Tensor:
        """Slots of the sequences' tokens, in the order of their positions: they stay as texts grow."""
        count = len(self._prompt_length)
        assert self._bank is not None
        needed = (int(position.max()) + 1) * count
        self._bank.keep_memory(1 << (needed - 1).bit_length())  # doubles, so that growing costs little
        return torch.from_numpy(position * count + sequence)

    def _after_pass(self, _module: nn.Module, _args: Any, output: Any) -> None:
        assert self._bank is not None
        self._bank.step.clear()
        if output is None:  # the pass was refused, or failed
            return
        parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        self._cache.remember(next((part for part in parts if hasattr(part, "get_seq_length")), None))
        if self._generation.passes is not None:
            self._generation.passes += 1

    def _note_uncached(self, inputs: Tensor) -> None:
        """Refuse a request that the caller extends without a cache: its prompt's length is unknown."""
        if self._generation.passes is not None or self.model.scoring or not depends_on_prompt_end(self.plan):
            self._uncached = None
            return
        last, self._uncached = self._uncached, inputs.detach().clone()
        if last is not None and last.shape[1] + 1 == inputs.shape[1] and torch.equal(inputs[:, :-1], last):
            raise ModelError(
                "a sequence grew by one token and was passed again without its cache, so nothing tells "
                f"its prompt from its answer, and {self.plan.policy_id!r} has gates that need to; pass "
                "past_key_values, use generate, or score it with session.logprobs(token_ids, prompt_length=…)"
            )

    def _admit(self, batch: int, past: int, spans: list[tuple[int, int]]) -> None:
        """Begin new requests if the cache is empty; else check that these continue the current ones."""
        assert self._bank is not None
        if batch > MAX_SEQUENCES:
            raise ModelError(f"a batch of {batch} sequences, but a session takes at most {MAX_SEQUENCES}")
        lengths = [end - start for start, end in spans]
        if past == 0:
            for slot in range(max(batch, len(self._prompt_length))):
                self._bank.step.forget_request(slot)
            self._evaluated = 0
            if (
                self._generation.passes
            ):  # without a cache, generation runs the same requests again, only longer
                if len(lengths) != len(self._prompt_length) or any(
                    now < prompt for now, prompt in zip(lengths, self._prompt_length, strict=True)
                ):
                    raise ModelError(
                        "generate runs other sequences than it began, which a session cannot follow"
                    )
                return
            demanded = self._demanded_prompt_length
            self._prompt_length = [length if demanded is None else demanded for length in lengths]
        elif self._generation.passes == 0:
            raise ModelError(
                f"generate was given a key-value cache of {past} tokens, but a session takes the first pass "
                "for the prompt; leave past_key_values out"
            )
        elif batch != len(self._prompt_length) or past != self._seen:
            raise ModelError(
                f"the key-value cache holds {past} tokens of {batch} sequences, but this session has seen "
                f"{self._seen} of {len(self._prompt_length)}; begin every request in the session, "
                "with an empty cache, and finish it before the next"
            )

    def _entries(
        self, sequence: int, span: tuple[int, int], past: int, tokens: int
    ) -> list[tuple[str | None, int, int, int]]:
        """(revision, slot, tokens, first position) of a sequence's left padding, tokens and right padding."""
        start, end = span
        first, last = max(start, past), min(end, past + tokens)
        if first >= last:
            return [(None, sequence, tokens, 0)]
        parts = [
            (None, sequence, first - past, 0),
            (self.revision, sequence, last - first, first - start),
            (None, sequence, past + tokens - last, 0),
        ]
        return [part for part in parts if part[2]]


def _plan(model: HookedModel, policy: Policy | Plan | str | Path, artifacts: str | Path | None) -> Plan:
    if isinstance(policy, Plan):
        return policy
    if not isinstance(policy, Policy):
        if not isinstance(policy, str | Path):
            raise PolicyError(f"policy = {policy!r}, but must be a policy, a plan, or the file of either")
        path = Path(policy)
        if path.suffix == ".safetensors":
            try:
                return read_plan(path.read_bytes())
            except OSError as error:
                raise PlanError(f"{path}: cannot be read ({error.strerror})") from error
            except PlanError as error:
                raise PlanError(f"{path}: {error}") from error
        policy = load_policy(path)
    folder = load_settings().paths.artifacts if artifacts is None else Path(artifacts)
    return compile_policy(policy, model=model.spec, artifacts=folder)


def _bank(model: HookedModel, plan: Plan) -> PlanBank:
    """Tables just large enough for one plan, with the plan in them. Raises `PlanError`."""
    scales = [len(edits.head_scale.gate) for edits in plan.edits.values() if edits.head_scale is not None]
    bank = PlanBank(
        model.spec,
        plan.edits,
        rows=max([2, *scales]),
        units_per_site=max([1, *(len(edits.units) for edits in plan.edits.values())]),
        requests=MAX_SEQUENCES,
        device=model.device,
    )
    bank.load(plan)
    return bank
