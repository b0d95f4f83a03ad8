"""Which modes of transformers' generation a session can follow, and which it refuses by name.

A session identifies each sequence by its position in the batch and its length in the key-value cache. So it
cannot follow generation that reorders sequences, removes tokens, or runs other texts in between.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from interpretops.errors import ModelError

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None, []),
    "force_words_ids": (None, []),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "dola_layers": (None,),
    "penalty_alpha": (None, 0),
    "guidance_scale": (None, 1),
    "custom_generate": (None,),
    "prefill_chunk_size": (None,),
}
"""Arguments of ``generate`` that select another generation mode, and the values that do not."""

_PACKED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of a transformers model that run several requests in one sequence."""


class FollowedGeneration:
    """``network.generate`` while a session is open: checks each call first, and tracks it while it runs.

    ``passes`` counts the forward passes of the running call; None if no call is running.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._replaced: dict[str, Any] = {}
        self.passes: int | None = None

    def install(self) -> None:
        """Wrap the network's methods with the checks."""
        own = vars(self._network)
        self._replaced = {name: own[name] for name in ("generate", *_PACKED) if name in own}
        generate = self._network.generate
        signature = inspect.signature(generate)

        def followed(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            _check_mode(given, self._network.generation_config)
            self.passes = 0
            try:
                return generate(*args, **kwargs)
            finally:
                self.passes = None

        own["generate"] = followed
        own |= {name: _refusing(name) for name in _PACKED if hasattr(self._network, name)}

    def remove(self) -> None:
        """Restore the network's methods."""
        own = vars(self._network)
        for name in ("generate", *_PACKED):
            own.pop(name, None)
        own.update(self._replaced)


class CacheWatch:
    """Detects that a key-value cache was reordered, cropped or replaced between two passes."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None

    def remember(self, cache: Any) -> None:
        """Remember the state of the cache after a pass; None if there is no cache."""
        self._keys = _first_keys(cache)

    def check(self, cache: Any) -> None:
        """Raise `ModelError` unless the cache is unchanged since the last pass."""
        keys, kept = _first_keys(cache), self._keys
        pending = getattr(_first_layer(cache), "_pending_beam_idx", None)
        if pending is None and keys is not None and kept is not None:
            if keys is kept:
                return
            if keys.shape == kept.shape and torch.equal(keys.to(kept.device), kept):
                return
        raise ModelError(
            "the key-value cache is not as the session's last pass left it; a session cannot follow beams, "
            "or a cache that is reordered, cropped or exchanged between passes"
        )


def _check_mode(given: Mapping[str, Any], model_default: Any) -> None:
    for name, harmless in _HARMLESS.items():
        value = given.get(name)
        if value is None:
            value = getattr(given.get("generation_config"), name, None)
        if value is None:
            value = getattr(model_default, name, None)
        if value not in harmless:
            kind = repr(value) if isinstance(value, int | float | str | list) else type(value).__name__
            raise ModelError(
                f"generate({name}={kind}), but a session follows only greedy search and sampling, in which "
                f"each sequence keeps its place and grows by the tokens it is given; leave {name} out"
            )
    if given.get("cache_implementation") == "paged":
        raise ModelError("generate(cache_implementation='paged'), but a session reads one request a sequence")


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise ModelError(
            f"{name} packs several requests into one sequence, which a session cannot follow; use generate"
        )

    return refuse


def _first_layer(cache: Any) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[0] if layers else None


def _first_keys(cache: Any) -> Tensor | None:
    keys = getattr(_first_layer(cache), "keys", None)
    return keys if isinstance(keys, Tensor) else None
