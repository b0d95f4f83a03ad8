"""The gates of a plan: when its edits act.

Shape letters: D width of the site, C conditions, K heads of a probe.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from interpretops.plan.edits import Array
from interpretops.plan.sites import Site

Combine = Literal["any", "all"]
Scope = Literal["token", "prompt_end", "prompt", "answer"]
PROBE_SCOPES = ("prompt", "answer")
"""Scopes of gates with an attention probe."""
Phase = Literal["both", "prefill", "decode"]

MAX_GATES = 8
"""The most gates a plan may have, including the implicit always-open gate."""
MAX_WINDOW = 1_000_000
"""The most tokens of a window; as float32 all numbers up to it are exact."""
MAX_ANSWER_WINDOW = 256
"""The most tokens of the window of a gate of scope `answer`, which is read at every generated token."""


@dataclass(frozen=True, eq=False)
class ProbePart:
    """The K heads of an attention probe at one site."""

    site: Site
    query: Array
    """[K, D]"""
    read: Array
    """[K, D]"""
    bias: Array
    """[K]"""
    max_norm: float = float("inf")


PROBE_FIELDS = ("query", "read", "bias")
REFUSAL = "refusal"
"""Name of the tensor that marks a refusal gate in a plan file."""
REFUSAL_MARK: Array = np.ones(1, np.float32)
"""The content of that tensor."""


@dataclass(frozen=True, eq=False)
class Gate:
    """When edits act. Fires at a token iff ``read . x + bias > cut`` for any or all of its conditions.

    A gate without conditions fires at every token, so only its phase matters. A gate of scope `prompt` has an
    attention probe instead. The probe's parts have K heads each and read at different sites; the last reads
    at the gate's site. Over prompt tokens t with a norm within a part's ``max_norm``, the sum over parts of

        sum_k sum_t softmax_t(query[k] . x_t) (read[k] . x_t + bias[k])

    must exceed cut[0]. With a ``window`` of W tokens, the largest of these sums over windows decides, where t
    and the softmax run over the window alone. Windows start at positions 0, S, 2 S, ... with S = max(1,
    W // 4), and the last one ends with the prompt. In a window, a part whose tokens are all above its
    ``max_norm`` adds 0. A prompt of at most W tokens is one window.

    A gate of scope `answer` has such a probe too. It reads at each position p from the prompt's length on: t
    runs over the last W positions up to p, without those of the prompt. If it stands ``beside`` a prompt
    gate, ``prompt_weight`` times that gate's reading is added. It fires where the sum exceeds cut[0].
    """

    site: Site | None
    read: Array
    bias: Array
    cut: Array
    combine: Combine = "any"
    scope: Scope = "token"
    """`prompt_end` reads only the prompt's last token; `prompt` decides there, from the whole prompt;
    `answer` decides at each generated token, from the latest of them."""
    latched: bool = False
    """Stay open from the first firing token to the end of the request; else open only at firing tokens."""
    phase: Phase = "both"
    max_norm: float = float("inf")
    probe: tuple[ProbePart, ...] = ()
    refusal: str | None = None
    """What clients get if the gate is open where the answer is generated and a grammar keeps the model from
    refusing in its own words; None for a gate that does not mean a refusal."""
    window: int | None = None
    """Tokens of the windows in which the probe reads; None: the whole prompt."""
    beside: int | None = None
    """Index of the prompt gate whose reading is added, for scope `answer`."""
    prompt_weight: float = 0.0

    @property
    def tensors(self) -> dict[str, Array]:
        """The gate's numbers by name."""
        found = {"read": self.read, "bias": self.bias, "cut": self.cut}
        for part in self.probe:
            found |= {f"{part.site}.{name}": getattr(part, name) for name in PROBE_FIELDS}
        # Arrays, so that attestations cover them; absent where unused, so that plans keep their revisions.
        if self.refusal is not None:
            found[REFUSAL] = REFUSAL_MARK
        if self.window is not None:
            found["window"] = np.array([self.window], np.float32)
        if self.beside is not None:
            found["beside"] = np.array([self.beside, self.prompt_weight], np.float32)
        return found

    def __len__(self) -> int:
        return int(self.read.shape[0])


def _no_conditions() -> Array:
    return np.zeros((0, 0), np.float32)


ALWAYS = Gate(None, _no_conditions(), np.zeros(0, np.float32), np.zeros(0, np.float32))
"""Gate 0 of every plan."""
